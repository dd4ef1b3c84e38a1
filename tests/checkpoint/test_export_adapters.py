"""Exported adapters: folders that peft and transformers read with the run's log-probabilities, in the form of vLLM."""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpo.adapters.spec import AdapterSpec
from dpo.adapters.start import trained_tensors
from dpo.base.sums import SUMS, find_fault
from dpo.config import Config, SourceConfig
from dpo.distributed.startup import open_world, start_devices
from dpo.hub.files import ADAPTER_CONFIG, ADAPTER_TENSORS
from dpo.model.build import load_policy, read_start
from tests.support.adapters import (
    KINDS,
    adapter_config,
    name_of,
    pair_logps,
    recorded_logps,
    rows_of,
    run_maker,
)
from tests.support.data_fixtures import CHAT_TEMPLATE, make_tokenizer, write_jsonl
from tests.support.models import save_model
from tests.support.runs import changed, exit_code, run

READERS: dict[str, Callable[[Path, Path], Any]] = {
    "peft": lambda base, final: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final),
    "transformers": lambda base, final: AutoModelForCausalLM.from_pretrained(final),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    return run_maker(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("family", "keys"), KINDS, ids=[name_of(*kind) for kind in KINDS])
def test_others_read_the_log_probabilities_of_the_run(runs: Any, family: str, keys: Any, reader: str) -> None:
    """Of every completion, summed, in float32; they are not those of the base."""
    model, run_dir = runs(family, **keys)
    ours = recorded_logps(run_dir, 2)
    found = pair_logps(READERS[reader](model, run_dir / "final").eval(), rows_of(run_dir))
    np.testing.assert_allclose(found, ours, rtol=1e-6)
    assert np.abs(ours - recorded_logps(run_dir, 0)).max() > 0.1


@pytest.mark.parametrize("reader", READERS)
def test_real_pairs(shared_data: Path, tmp_path: Path, reader: str) -> None:
    """stories260K on pairs of HH as text: the tokenizer of final/ gives the ids, the model the log-probabilities."""
    rows = [json.loads(line) for line in (shared_data / "golden-trl" / "pairs.jsonl").read_text().splitlines()[:8]]
    base, keys = shared_data / "stories260K", ("prompt", "chosen", "rejected")
    pairs = write_jsonl(tmp_path / "hh.jsonl", [{key: row[key] for key in keys} for row in rows])
    config = adapter_config(base, tmp_path / "run", data__eval=[SourceConfig(pairs)], eval__samples=0)
    final = run(changed(config, data__train=[SourceConfig(pairs)])) / "final"
    tokenizer, plain = (AutoTokenizer.from_pretrained(folder) for folder in (final, base))
    assert type(tokenizer) is type(plain)
    assert (final / "LICENSE").read_bytes() == (base / "LICENSE").read_bytes()
    found = pair_logps(READERS[reader](base, final).eval(), [encoded(tokenizer, row) for row in rows])
    np.testing.assert_allclose(found, recorded_logps(tmp_path / "run", 2), rtol=1e-6)


def encoded(tokenizer: Any, row: dict[str, str]) -> dict[str, Any]:
    """The ids of a pair of texts: no token lies across the space between prompt and answer."""
    prompt = tokenizer(row["prompt"]).input_ids
    answers = [tokenizer(row["prompt"] + row[side]).input_ids[len(prompt) :] for side in ("chosen", "rejected")]
    return {"prompt_ids": prompt, "completion_ids": [[*ids, tokenizer.eos_token_id] for ids in answers]}


# --- the files -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class VllmFields:
    """The keys of adapter_config.json that vLLM reads, and what it makes of them (vllm/lora/peft_helper.py)."""

    r: int
    lora_alpha: int
    target_modules: list[str]
    bias: str = "none"
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    @classmethod
    def read(cls, folder: Path) -> "VllmFields":
        content = json.loads((folder / ADAPTER_CONFIG).read_text())
        return cls(**{key.name: content[key.name] for key in dataclasses.fields(cls) if key.name in content})

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def test_the_form_of_vllm(runs: Any) -> None:
    """Lists of the layers' last names and whole numbers; tensors that end in lora_A.weight or lora_B.weight."""
    final = runs("llama")[1] / "final"
    fields = VllmFields.read(final)
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert fields == VllmFields(3, 5, names) and type(fields.lora_alpha) is int and fields.scaling == 5 / 3
    with safe_open(final / ADAPTER_TENSORS, framework="pt") as file:
        found, form = set(file.keys()), file.metadata()
    parts = {f"self_attn.{name}" if name[0] in "kqvo" else f"mlp.{name}" for name in names}
    layers = [f"base_model.model.model.layers.{layer}.{part}" for layer in (0, 1) for part in parts]
    assert found == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"} and form == {"format": "pt"}
    rslora = VllmFields.read(runs("gpt-neox", lora__rslora=True)[1] / "final")
    assert rslora.scaling == 5 / math.sqrt(3) and rslora.modules_to_save is None


def test_embeddings_are_written_as_peft_writes_them(runs: Any) -> None:
    """Both tensors, also where they are one: then peft is told to keep them so."""
    for family, tied in (("llama", False), ("llama-tied", True)):
        final = runs(family, lora__train_embeddings=True)[1] / "final"
        content = json.loads((final / ADAPTER_CONFIG).read_text())
        assert content["modules_to_save"] == ["embed_tokens", "lm_head"] and content["ensure_weight_tying"] is tied
        tensors = load_file(final / ADAPTER_TENSORS)
        head, embedding = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
        assert torch.equal(tensors[head], tensors[embedding]) is tied


@pytest.mark.parametrize("magnitude", ["lora_magnitude_vector.weight", "lora_magnitude_vector"])
def test_a_run_that_starts_from_exported_adapters_starts_where_they_ended(
    runs: Any, tmp_path: Path, magnitude: str
) -> None:
    """Magnitudes too, by our name and by peft's: the evaluation before its first step is the last of the other run."""
    model, run_dir = runs("llama", lora__dora=True)
    final = Path(shutil.copytree(run_dir / "final", tmp_path / "start"))
    tensors = load_file(final / ADAPTER_TENSORS)
    assert sum(name.endswith(".lora_magnitude_vector.weight") for name in tensors) == 14
    named = {re.sub(r"lora_magnitude_vector\.weight$", magnitude, name): tensor for name, tensor in tensors.items()}
    save_file(named, final / ADAPTER_TENSORS)
    config = adapter_config(model, tmp_path / "run", lora__rank=None, lora__alpha=None, train__steps=1)
    run(changed(config, lora__path=str(final)))
    np.testing.assert_allclose(recorded_logps(tmp_path / "run", 0), recorded_logps(run_dir, 2), rtol=1e-6)


def test_tied_embeddings_are_read_again(runs: Any) -> None:
    """Into a fresh policy: every tensor of it is that of the file, under each of its names."""
    model, run_dir = runs("llama-tied", lora__train_embeddings=True)
    spec = AdapterSpec(rank=3, alpha=5, embeddings=True, folder=run_dir / "final")
    with open_world(60) as world:
        start_devices(world, 60)
        policy = load_policy(adapter_config(model, run_dir), world, AutoConfig.from_pretrained(model), model, spec)
        read_start(policy)
        tensors = {name: tensor.full_tensor() for name, tensor in trained_tensors(policy.model).items()}
    stored = load_file(run_dir / "final" / ADAPTER_TENSORS)
    assert tensors.keys() == stored.keys() and all(torch.equal(tensors[name], stored[name]) for name in stored)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of two steps, whose tokenizer names no class and lies beside a licence."""
    model, run_dir = tmp_path / "model", tmp_path / "run"
    save_model(model, "llama")
    make_tokenizer(bos=True).save_pretrained(model)
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["tokenizer_class"]
    path.write_text(json.dumps(settings))
    (model / "LICENSE").write_text("MIT License")
    return adapter_config(model, run_dir, eval__samples=0)


def test_what_lies_there(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer with its template and class, the licence, a card and sums; the base by a path that holds from
    everywhere.
    """
    monkeypatch.chdir(tmp_path)
    final = run(changed(config, model__path="model")) / "final"
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in final.iterdir()} == {
        *(ADAPTER_CONFIG, ADAPTER_TENSORS, "README.md", "LICENSE", SUMS),
        *tokenizer,
    }
    assert find_fault(final) is None
    assert json.loads((final / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "run")
    assert json.loads((final / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = AutoTokenizer.from_pretrained(final)
    assert loaded.chat_template == CHAT_TEMPLATE and loaded("QZ").input_ids == [1, 99]


def test_adapters_of_a_run_in_float64_are_float32(config: Config) -> None:
    final = run(changed(config, model__dtype="float64", parallel__reduce_dtype="float64")) / "final"
    assert {tensor.dtype for tensor in load_file(final / ADAPTER_TENSORS).values()} == {torch.float32}


def test_bfloat16_where_it_is_asked_for(config: Config) -> None:
    final = run(changed(config, checkpoint__export_dtype="bfloat16")) / "final"
    assert {tensor.dtype for tensor in load_file(final / ADAPTER_TENSORS).values()} == {torch.bfloat16}


# --- a finished run --------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(config) == 0
    assert f"done: 2 steps, the adapters are in {config.train.run_dir}/final" in capsys.readouterr().err
    before = (Path(str(config.train.run_dir)) / "final" / ADAPTER_TENSORS).stat().st_mtime_ns
    assert exit_code(config) == 0
    assert "its 2 steps are done, the adapters are in " in capsys.readouterr().err
    assert (Path(str(config.train.run_dir)) / "final" / ADAPTER_TENSORS).stat().st_mtime_ns == before


def test_a_finished_run_without_its_page_gets_one(config: Config) -> None:
    """A kill came between export and page: there is none, or one that is older than the adapters."""
    page = run(config) / "report.html"
    page.unlink()
    assert exit_code(config) == 0 and page.is_file()
    os.utime(page, (0, 0))
    assert exit_code(config) == 0 and page.stat().st_mtime > 0
    before = page.stat().st_mtime_ns
    assert exit_code(config) == 0 and page.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_TENSORS, "tokenizer.json"])
def test_damaged_adapters_are_exported_again(
    config: Config, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte of a file, and a file that is gone."""
    final = run(config) / "final"
    shutil.copytree(final, tmp_path / "whole")
    content = bytearray((final / name).read_bytes())
    content[-2] ^= 1
    (final / name).write_bytes(content)
    assert exit_code(config) == 0
    assert f"{final} is damaged, and is exported again: " in capsys.readouterr().err
    (final / name).unlink()
    assert exit_code(config) == 0
    assert {path.name: path.read_bytes() for path in final.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }
