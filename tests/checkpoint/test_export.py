"""Exported models: plain Hugging Face folders that give the run's log-probabilities, whole or not there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from dpo.checkpoint.folders import checkpoint_path
from dpo.config import Config, SourceConfig, to_yaml
from dpo.distributed.program import run_program
from dpo.export import program as export
from dpo.run_folder.files import read_metrics
from tests.checkpoint.test_kept import Events
from tests.support.data_fixtures import CHAT_TEMPLATE, make_tokenizer
from tests.support.models import FAMILIES, plain_logp, plain_model, save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import changed, exit_code, exit_code_of, make_config, run, weights_of

NUM_EVAL = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.jsonl and eval.jsonl."""
    root = tmp_path_factory.mktemp("export")
    save_pairs(root / "pairs.jsonl", 4)
    save_pairs(root / "eval.jsonl", NUM_EVAL, seed=1)
    return root


def make(data: Path, model: Path, run_dir: Path, **changes: object) -> Config:
    """Two steps that move the weights visibly, a checkpoint and an evaluation after each."""
    facts = {
        "data__eval": [SourceConfig(str(data / "eval.jsonl"))],
        "batch__pairs_per_step": 4,
        "train__steps": 2,
        "train__eval_every": 1,
        "optim__lr": 1e-3,
        "optim__warmup_steps": 0,
        "checkpoint__save_every": 1,
    }
    return make_config(model, data / "pairs.jsonl", run_dir, **(facts | changes))


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Config:
    return make(data, save_model(tmp_path / "model", "llama-tied"), tmp_path / "run")


def test_the_sums_are_those_of_sha256sum(config: Config, tmp_path: Path) -> None:
    """Of every file but the card, which people edit: coreutils finds all of them as they are."""
    final = run(config) / "final"
    listed = [line[66:] for line in (final / "SHA256SUMS").read_text().splitlines()]
    names = {path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file()}
    assert listed == sorted(names - {"README.md", "SHA256SUMS"})
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=final, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_model_is_on_the_disk_before_the_one_before_it_goes(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files and the folder, then its name and the folder above; an empty folder that was there is removed last."""
    run_dir = run(config)
    (tmp_path / "out").mkdir()
    events = Events(tmp_path, monkeypatch)
    assert run_export(run_dir, tmp_path / "out") == 0
    renamed = events.done.index(("renamed", "out"))
    synced = {name for what, name in events.done[:renamed] if what == "synced"}
    files = {f".out.draft/{path.name}" for path in (tmp_path / "out").iterdir()}
    assert files | {".out.draft"} <= synced and ".out.draft/model.safetensors" in files
    removed = max(number for number, (what, _) in enumerate(events.done) if what == "removed")
    assert events.done.index(("synced", "."), renamed) < removed


def run_export(checkpoint: Path, out: Path, *more: str) -> int:
    """The exit code of `python -m dpo.export`."""
    return exit_code_of(export.main, "dpo.export", "--checkpoint", str(checkpoint), "--out", str(out), *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def eval_logps(data: Path, folder: Path) -> tuple[float, float]:
    """The oracle: means over the evaluation pairs of the winner's and the loser's log-probability, nats."""
    model = plain_model(folder)
    rows = [json.loads(line) for line in (data / "eval.jsonl").read_text().splitlines()]
    table = [[plain_logp(model, row["prompt_ids"], ids).item() for ids in row["completion_ids"]] for row in rows]
    winners, losers = np.mean(table, axis=0)
    return winners, losers


def logged(run_dir: Path, step: int) -> tuple[float, float]:
    (line,) = [line for line in read_metrics(run_dir) if line["step"] == step and "eval/loss" in line]
    return line["eval/logps/chosen"], line["eval/logps/rejected"]


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_final_and_export_give_the_log_probabilities_of_the_run(data: Path, tmp_path: Path, family: str) -> None:
    """Loaded with plain `from_pretrained`, both give what the run's evaluations logged; they are equal to the byte."""
    config = make(data, save_model(tmp_path / "model", family), tmp_path / "run")
    run_dir = run(config)
    assert eval_logps(data, run_dir / "final") == pytest.approx(logged(run_dir, 2), rel=1e-5)
    assert run_export(checkpoint_path(run_dir, 2), tmp_path / "two") == 0
    assert contents(tmp_path / "two") == contents(run_dir / "final")
    assert run_export(checkpoint_path(run_dir, 1), tmp_path / "one") == 0
    assert eval_logps(data, tmp_path / "one") == pytest.approx(logged(run_dir, 1), rel=1e-5)
    assert abs(logged(run_dir, 1)[0] - logged(run_dir, 2)[0]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_model_that_came_in(data: Path, tmp_path: Path, family: str) -> None:
    """Tensor for tensor, so tied heads once and GPT-NeoX under its own names; the config but for nothing."""
    model = save_model(tmp_path / "model", family)
    run_dir = run(make(data, model, tmp_path / "run", train__steps=1))
    before, after = weights_of(model), weights_of(run_dir / "final")
    assert {name: (w.shape, w.dtype) for name, w in after.items()} == {n: (w.shape, w.dtype) for n, w in before.items()}
    assert not any(torch.equal(before[name], after[name]) for name in ("lm_head.weight",) if name in before)
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (model, run_dir / "final")]
    for facts in configs:
        facts.pop("_name_or_path", None)
    assert configs[0] == configs[1]


@pytest.mark.parametrize("way", ["base", "final", "command"])
def test_bfloat16(config: Config, tmp_path: Path, way: str) -> None:
    """Each float32 weight rounded once; config.json says so, so that `from_pretrained` with dtype auto has it too."""
    if way == "base":
        save_model(tmp_path / "model", "llama-tied", dtype=torch.bfloat16)
    run_dir = run(changed(config, checkpoint__export_dtype="bfloat16" if way == "final" else "auto"))
    assert run_export(checkpoint_path(run_dir, 2), tmp_path / "full", "--dtype", "float32") == 0
    folder = run_dir / "final"
    if way == "command":
        folder = tmp_path / "half"
        assert run_export(checkpoint_path(run_dir, 2), folder, "--dtype", "bfloat16") == 0
    full, half = weights_of(tmp_path / "full"), weights_of(folder)
    assert full.keys() == half.keys()
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert plain_model(folder, dtype="auto").dtype == torch.bfloat16


def test_a_run_in_float64_is_exported_in_float32(config: Config) -> None:
    run_dir = run(changed(config, model__dtype="float64", parallel__reduce_dtype="float64"))
    assert {weight.dtype for weight in weights_of(run_dir / "final").values()} == {torch.float32}


# --- what else lies there --------------------------------------------------------------------------------------------


def test_tokenizer_template_and_generation_config(config: Config, tmp_path: Path) -> None:
    """What generates like the model that came in; transformers refuses to save this generation config, and models
    with one like it are about.
    """
    make_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    generation = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "eos_token_id": [2, 7], "max_length": 77}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    final = run(config) / "final"
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "model", final))
    messages = [{"role": "user", "content": "Hi QZ"}]
    assert after("some text QZ").input_ids == before("some text QZ").input_ids
    assert after.chat_template == CHAT_TEMPLATE
    assert after.apply_chat_template(messages, tokenize=False) == before.apply_chat_template(messages, tokenize=False)
    assert after.special_tokens_map == before.special_tokens_map
    loaded = GenerationConfig.from_pretrained(final)
    assert {name: getattr(loaded, name) for name in generation} == generation


def test_another_tokenizer_is_the_one_exported(config: Config, tmp_path: Path) -> None:
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "model")
    make_tokenizer(chat_template="{{ 'other' }}").save_pretrained(tmp_path / "tokenizer")
    final = run(changed(config, model__tokenizer=str(tmp_path / "tokenizer"))) / "final"
    assert AutoTokenizer.from_pretrained(final).chat_template == "{{ 'other' }}"


def test_no_tokenizer_and_no_generation_config(config: Config, tmp_path: Path) -> None:
    (tmp_path / "model" / "generation_config.json").unlink()
    final = run(config) / "final"
    assert sorted(path.name for path in final.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("content", [b"{}", b"{", b"[]", b'{"auto_map": 1}', b"\xff"])
def test_a_tokenizer_of_no_use_does_not_cost_the_model(
    content: bytes, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data in `format: tokens` never looked at it; the end of a long run is no time to fail over it."""
    broken = tmp_path / "model" / "tokenizer_config.json"
    broken.write_bytes(content)
    assert exit_code(config) == 0
    assert (tmp_path / "run" / "final" / "tokenizer_config.json").read_bytes() == content
    (tmp_path / "other").mkdir()
    broken.rename(tmp_path / "other" / broken.name)
    elsewhere = changed(config, model__tokenizer=str(tmp_path / "other"), train__run_dir=str(tmp_path / "second"))
    assert exit_code(elsewhere) == 0
    assert (tmp_path / "second" / "final" / "model.safetensors").is_file()
    assert "the exported model has no tokenizer: " in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_does_not_cost_the_model(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(changed(config, model__tokenizer="./absent")) == 0
    assert "the exported model has no tokenizer: model.tokenizer: ./absent: no such" in capsys.readouterr().err
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_a_large_model_is_several_files_with_an_index(
    config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 kB a file: more than two files, and the log-probabilities of the whole."""
    monkeypatch.setattr("dpo.model.weights.FILE_BYTES", 10_000)
    run_dir = run(config)
    assert len(list((run_dir / "final").glob("model-*.safetensors"))) > 2
    assert (run_dir / "final" / "model.safetensors.index.json").is_file()
    assert eval_logps(data, run_dir / "final") == pytest.approx(logged(run_dir, 2), rel=1e-5)


# --- an embedding and a head that config.json ties -------------------------------------------------------------------


def two_heads(folder: Path, seed: int = 0) -> Path:
    """A folder with an embedding and a head of different values, whose config ties them."""
    path = save_model(folder, "llama", seed) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    return folder


def test_both_heads_are_trained_and_exported(data: Path, tmp_path: Path) -> None:
    """Before training, as plain transformers reads the start; after it, as it reads final/, by which others tie."""
    model = two_heads(tmp_path / "model")
    config = make(data, model, tmp_path / "run", train__steps=1)
    run_dir = run(config)
    assert logged(run_dir, 0) == pytest.approx(eval_logps(data, model), rel=1e-5)
    assert json.loads((run_dir / "final" / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = weights_of(model), weights_of(run_dir / "final")
    heads = ("lm_head.weight", "model.embed_tokens.weight")
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in heads)
    run(changed(config, train__steps=2))  # goes on from the checkpoint
    assert logged(run_dir, 2) == pytest.approx(eval_logps(data, run_dir / "final"), rel=1e-5)
    assert run_export(checkpoint_path(run_dir, 2), tmp_path / "two") == 0
    assert contents(tmp_path / "two") == contents(run_dir / "final")


def test_both_heads_of_a_reference(data: Path, tmp_path: Path) -> None:
    """Rewards are beta times the policy's log-probability less the reference's, each by plain transformers."""
    model, reference = save_model(tmp_path / "model", "llama-tied"), two_heads(tmp_path / "reference", seed=1)
    run_dir = run(make(data, model, tmp_path / "run", train__steps=1, reference__path=str(reference)))
    (line,) = [line for line in read_metrics(run_dir) if line["step"] == 0 and "eval/loss" in line]
    sides = zip(eval_logps(data, model), eval_logps(data, reference), strict=True)
    rewards = [line["eval/rewards/chosen"], line["eval/rewards/rejected"]]
    assert rewards == pytest.approx([0.1 * (policy - ref) for policy, ref in sides], rel=1e-4)


# --- on ranks --------------------------------------------------------------------------------------------------------


def export_as_rank(checkpoint: str, out: str) -> int:
    """A rank of `torchrun -m dpo.export`."""
    with patch.object(sys, "argv", ["dpo.export", "--checkpoint", checkpoint, "--out", out]):
        return run_program(export.main)


def train_as_rank(config: Config) -> None:
    """A rank of a run."""
    run(config)


@pytest.mark.xdist_group("ranks")
def test_ranks_write_what_one_writes(config: Config, ranks: Ranks, tmp_path: Path) -> None:
    """A checkpoint of 2 ranks, exported by 3 and by 1: the bytes of final/, which the 2 wrote."""
    ranks(2, train_as_rank, config)
    checkpoint = checkpoint_path(tmp_path / "run", 2)
    assert ranks(3, export_as_rank, str(checkpoint), str(tmp_path / "three")) == [0, 0, 0]
    assert run_export(checkpoint, tmp_path / "one") == 0
    assert contents(tmp_path / "three") == contents(tmp_path / "one") == contents(tmp_path / "run" / "final")


# --- whole or not there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "dpo.checkpoint.export.save_tensors",
        "dpo.checkpoint.companions.shutil.copyfile",
        "dpo.checkpoint.companions._write_tokenizer",
    ],
)
def test_an_interrupted_export_leaves_no_half_folder(
    config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Whichever part fails, final/ is not there; the next start only exports."""
    with monkeypatch.context() as context:

        def fail(*args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        context.setattr(place, fail)
        assert exit_code(config) == 1
    assert not (tmp_path / "run" / "final").exists()
    run_dir = run(config)
    assert eval_logps(data, run_dir / "final") == pytest.approx(logged(run_dir, 2), rel=1e-5)
    assert not list(run_dir.glob(".final*"))
    assert [line["step"] for line in read_metrics(run_dir) if "train/loss" in line] == [1, 2]


def test_a_run_folder_is_its_newest_checkpoint(config: Config, tmp_path: Path) -> None:
    run_dir = run(config)
    assert run_export(run_dir, tmp_path / "newest") == 0
    assert contents(tmp_path / "newest") == contents(run_dir / "final")


def test_wrong_command_lines(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each one line, exit code 2, and nothing written."""
    run_dir = run(config)
    checkpoint = checkpoint_path(run_dir, 2)
    shutil.copytree(run_dir, tmp_path / "broken")
    (checkpoint_path(tmp_path / "broken", 2) / "COMPLETE").unlink()
    shutil.copytree(checkpoint, tmp_path / "elsewhere" / "checkpoints" / "step-000002")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    cases = {
        "config.yaml is missing; valid: a checkpoint that lies in its run folder": (
            tmp_path / "elsewhere" / "checkpoints" / "step-000002",
            tmp_path / "out",
        ),
        "it is not complete: no COMPLETE": (checkpoint_path(tmp_path / "broken", 2), tmp_path / "out"),
        f"{run_dir / 'final'} is an exported model; valid: {checkpoint}": (run_dir / "final", tmp_path / "out"),
        f"{tmp_path} is no checkpoint and no run with one; valid: a folder RUN/": (
            tmp_path,
            tmp_path / "out",
        ),
        f"no such folder: {checkpoint_path(run_dir, 9)}": (checkpoint_path(run_dir, 9), tmp_path / "out"),
        f"--out: {tmp_path / 'full'} is not empty": (checkpoint, tmp_path / "full"),
        f"--out: {tmp_path / 'full' / 'file'} is not empty": (checkpoint, tmp_path / "full" / "file"),
    }
    capsys.readouterr()
    for what, (folder, out) in cases.items():
        assert run_export(folder, out) == 2, what
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert what in error
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_a_checkpoint_asks_for_no_code_by_itself(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config beside it, which may be anybody's, says that a repository's code is to be run: that is a word of the
    command line, too.
    """
    path = run(config) / "config.yaml"
    path.write_text(to_yaml(changed(config, model__trust_remote_code=True)))
    assert run_export(tmp_path / "run", tmp_path / "out") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"runs the code of the repository {config.model.path}; valid: with --trust-remote-code" in error
    assert run_export(tmp_path / "run", tmp_path / "out", "--trust-remote-code") == 0


def test_an_empty_folder_and_a_relative_checkpoint_will_do(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run(config)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(run_dir / "checkpoints")
    assert run_export(Path("step-000002"), tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(run_dir / "final")


def test_wrong_arguments_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo.export", "--checkpoint", "x"])
    assert run_program(export.main) == 2
    assert capsys.readouterr().err.startswith(
        "error: command line: the following arguments are required: --out; valid: "
    )
