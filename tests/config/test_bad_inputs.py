"""Bad input from the command line to the exit code: one line on stderr that names the place, 2, and nothing written.

The corpora of bad configs and bad data files are in `test_config.py` and `test_bad_data.py`; here are the inputs that
meet only in a run.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BloomConfig, MixtralConfig, PreTrainedTokenizerFast

from dpo.distributed.program import run_program
from dpo.train.program import main
from tests.support.models import VOCAB, plain_model, save_model, save_pairs
from tests.support.ranks import Ranks


def save_tokenizer(folder: Path, num_tokens: int = VOCAB, eos: str | None = "</s>") -> None:
    """A tokenizer of whole words w3, w4, ..."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, num_tokens)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=eos).save_pretrained(folder)


def save_texts(path: Path, num_rows: int = 70) -> Path:
    rows = [{"prompt": f"w{i % 90 + 3}", "chosen": "w5 w6", "rejected": "w7"} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def good(folder: Path) -> None:
    save_model(folder / "model", "llama")
    save_tokenizer(folder / "model")
    save_texts(folder / "data.jsonl")


def no_model(folder: Path) -> None:
    good(folder)
    (folder / "model").rename(folder / "elsewhere")


def no_safetensors(folder: Path) -> None:
    good(folder)
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def broken_safetensors(folder: Path) -> None:
    good(folder)
    (folder / "model" / "model.safetensors").write_bytes(b"not weights")


def alibi(folder: Path) -> None:
    good(folder)
    BloomConfig(vocab_size=VOCAB).save_pretrained(folder / "model")


def mixture(folder: Path) -> None:
    good(folder)
    MixtralConfig(vocab_size=VOCAB).save_pretrained(folder / "model")


def no_eos(folder: Path) -> None:
    good(folder)
    save_tokenizer(folder / "model", eos=None)


def large_vocabulary(folder: Path) -> None:
    """The tokenizer has w97, which the model has not, and a row has it."""
    good(folder)
    save_tokenizer(folder / "model", num_tokens=VOCAB + 3)
    with (folder / "data.jsonl").open("a") as file:
        file.write('{"prompt": "w3", "chosen": "w4", "rejected": "w97"}\n')


def few_pairs(folder: Path) -> None:
    good(folder)
    save_texts(folder / "data.jsonl", num_rows=63)


def broken_row(folder: Path) -> None:
    good(folder)
    with (folder / "data.jsonl").open("a") as file:
        file.write('{"prompt": "w3", "chosen": "w4"\n')


def run_folder_is_a_file(folder: Path) -> None:
    good(folder)
    (folder / "runs").mkdir()
    (folder / "runs" / "c").write_text("")


def other_shapes(folder: Path) -> None:
    good(folder)
    path = folder / "model" / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'))


CASES: list[tuple[Callable[[Path], None], str]] = [
    (no_model, "model.path: no such folder: ./model; valid: a Hugging Face model folder or hub id"),
    (no_safetensors, "model.path: ./model has no *.safetensors; convert it with: python -c "),
    (broken_safetensors, "model/model.safetensors: not a readable safetensors file"),
    (alibi, "model.path: bloom models are not supported: ALiBi biases attention by distance"),
    (mixture, "model.path: mixtral models are not supported: in a mixture of experts"),
    (no_eos, "model.tokenizer: ./model: the tokenizer has no EOS token; valid: "),
    (large_vocabulary, "data.jsonl:71: token id 97 is outside of the model's vocabulary; valid: 0 to 96"),
    (few_pairs, "data.train: 63 pairs to train on, fewer than batch.pairs_per_step 64; valid: "),
    (broken_row, "data.jsonl:71: "),
    (run_folder_is_a_file, "train.run_dir: runs/c"),
    (other_shapes, "model/model.safetensors: model.layers.0.mlp."),
]


@pytest.mark.parametrize(("spoil", "line"), CASES, ids=[case[0].__name__ for case in CASES])
def test_bad_input_is_one_line_and_exit_code_2(
    spoil: Callable[[Path], None],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The line is the last thing on stderr, only counts of the data may stand before it; no run folder is made."""
    spoil(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {path: ./model}\ndata: {train: [{path: data.jsonl}]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo.train", "--config", "c.yaml", "--train.steps", "1"])
    assert run_program(main) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert line in errors[0]
    assert not (tmp_path / "runs" / "c").is_dir()
    assert not list(tmp_path.rglob("final"))


def save_adapters(folder: Path, **changes: object) -> Path:
    """Adapters for `good`, without effect, as peft writes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(plain_model(folder / "model"), LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=8))
    model.save_pretrained(str(folder / "sft"))
    path = folder / "sft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "./model"} | changes))
    return folder / "sft"


BAD_ADAPTERS: list[tuple[dict[str, object], list[str], str]] = [
    ({"r": 0}, ["lora.path=sft"], "sft/adapter_config.json: r: got 0; valid: an integer >= 1 and < 65536"),
    ({"peft_type": "IA3"}, ["lora.path=sft"], "peft_type: adapters of the kind IA3 are not supported; valid: LORA"),
    ({"lora_bias": True}, ["lora.path=sft"], "lora_bias: a bias of each adapter is not supported, got True; valid: "),
    ({}, ["lora.path=sft", "lora.rank=8"], "lora.rank: 8 is given, and adapter_config.json of lora.path sft has 4"),
    ({}, ["lora.path=model"], "lora.path: model holds a model, not adapters; valid: a folder of adapters"),
    ({}, ["lora.path=gone"], "lora.path: no such folder: gone; valid: a folder of adapters in peft's form"),
    ({}, ["reference.path=sft"], "reference.path: sft holds adapters, not a model; valid: a whole model"),
    ({}, ["lora.rank=0"], "command line: lora.rank: must be >= 1 and < 65536, got 0; valid: null or an integer >= 1"),
    ({}, ["lora.alpha=8"], "command line: lora.alpha: there are no adapters, since lora.rank and lora.path are null"),
]


@pytest.mark.parametrize(("changes", "words", "line"), BAD_ADAPTERS, ids=lambda case: str(case)[:40])
def test_bad_adapters_are_one_line_before_weights_are_read(
    changes: dict[str, object],
    words: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good(tmp_path)
    save_adapters(tmp_path, **changes)
    (tmp_path / "c.yaml").write_text("model: {path: ./model}\ndata: {train: [{path: data.jsonl}]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo.train", "--config", "c.yaml", *words])
    assert run_program(main) == 2
    told = capsys.readouterr().err
    errors = [text for text in told.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and line in errors[0]
    assert "hashing" not in told and not (tmp_path / "runs" / "c").is_dir()


def test_a_folder_of_adapters_as_the_model_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the adapters, with the tokenizer of the base; what is not taken as it stands is told, each in one line."""
    good(tmp_path)
    save_adapters(tmp_path, lora_dropout=0.1)
    (tmp_path / "c.yaml").write_text("model: {path: sft}\ndata: {train: [{path: data.jsonl}]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo.train", "--config", "c.yaml", "--train.steps", "1"])
    assert run_program(main) == 0
    told = capsys.readouterr().err
    for line in (
        "model.path sft holds adapters: taken as lora.path sft, model.path ./model",
        "WARNING: sft/adapter_config.json: lora_dropout 0.1 is taken as 0: adapters have no dropout here",
        "WARNING: optim.lr 1e-06 is that of whole models, with which adapters hardly move; usual for them: 5e-6 to",
    ):
        assert told.count(line) == 1, told
    settings = json.loads((tmp_path / "runs" / "c" / "final" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["target_modules"] == ["q_proj"]
    kept = (tmp_path / "runs" / "c" / "config.yaml").read_text()
    assert "path: ./model" in kept and "path: sft" in kept


def test_the_report_comes_before_an_error_about_too_few_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `few_pairs`, in the order in which a user reads it."""
    few_pairs(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {path: ./model}\ndata: {train: [{path: data.jsonl}]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo.train", "--config", "c.yaml"])
    assert run_program(main) == 2
    told = capsys.readouterr().err
    assert 0 < told.index("63 rows, 63 pairs kept, 0 dropped") < told.index("63 pairs to train on, fewer than")
    assert "hashing" not in told, "hours of a large model's weights for an error that is known"


def test_a_good_input_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files unspoilt: the cases above fail for their own reason alone."""
    good(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {path: ./model}\ndata: {train: [{path: data.jsonl}]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo.train", "--config", "c.yaml", "--train.steps", "1"])
    assert run_program(main) == 0
    assert (tmp_path / "runs" / "c" / "final" / "model.safetensors").is_file()


def train_as_rank(folder: Path) -> tuple[int, str]:
    """(exit code, stderr) of `dpo.train` with c.yaml on this rank."""
    stderr = io.StringIO()
    argv = ["dpo.train", "--config", str(folder / "c.yaml")]
    with contextlib.redirect_stderr(stderr), mock.patch.object(sys, "argv", argv):
        return run_program(main), stderr.getvalue()


@pytest.mark.xdist_group("ranks")
def test_one_of_two_ranks_tells_what_is_wrong_with_the_config(tmp_path: Path, ranks: Ranks) -> None:
    """All find it, before there is a process group."""
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {train: [{path: d.jsonl}]}\nloss: {beta: -1}\n")
    (code, said), other = ranks(2, train_as_rank, tmp_path)
    assert code == 2 and said.startswith("error: ") and "loss.beta" in said and said.count("\n") == 1
    assert other == (2, "")


def test_under_torchrun_the_line_appears_exactly_once(tmp_path: Path) -> None:
    """Two ranks, and an error of the data, which is found when there is a process group."""
    argument = "--data.train=[{path: missing.jsonl}]"
    save_pairs(tmp_path / "data.jsonl", 64)
    save_model(tmp_path / "model", "llama")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "c.yaml").write_text("model: {path: ./model}\ndata: {train: [{path: data.jsonl}]}\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "dpo.train", "--config", "c.yaml", argument]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 1  # torchrun's own, whatever the ranks' is
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    assert (
        f'File "{Path(run_program.__code__.co_filename).parent}' not in result.stderr
    )  # no traceback but torchrun's own
    assert "exitcode  : 2" in result.stderr
