"""`python -m dpo.export` of adapters: merged into their base, alone, on ranks; and its command line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import AutoConfig

from dpo.adapters.merge import merged_weights
from dpo.adapters.spec import AdapterSpec
from dpo.checkpoint.folders import checkpoint_path
from dpo.config.keys import KEYS
from dpo.export import program as export
from dpo.hub.files import ADAPTER_CONFIG, ADAPTER_TENSORS
from dpo.run.identity import NO_ADAPTERS, adapter_facts, recorded_adapters
from tests.support.adapters import (
    KINDS,
    adapter_config,
    name_of,
    pair_logps,
    recorded_logps,
    rows_of,
    run_maker,
)
from tests.support.models import plain_model, save_model
from tests.support.ranks import Ranks
from tests.support.runs import error_lines, exit_code_of, run, weights_of

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    return run_maker(tmp_path_factory.mktemp("merged"))


def run_export(*words: object) -> int:
    """The exit code of `python -m dpo.export`; as a rank of several too."""
    return exit_code_of(export.main, "dpo.export", *map(str, words))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "keys"), KINDS, ids=[name_of(*kind) for kind in KINDS])
def test_the_merged_model_gives_the_log_probabilities_of_the_run(
    runs: Any, tmp_path: Path, ranks: Ranks, family: str, keys: Any
) -> None:
    """By plain transformers, in float32; on 1, 2 and 3 ranks; from the checkpoint and from final/."""
    model, run_dir = runs(family, **keys)
    assert run_export("--checkpoint", run_dir, "--merge", "--out", tmp_path / "1") == 0
    ours = recorded_logps(run_dir, 2)
    np.testing.assert_allclose(pair_logps(plain_model(tmp_path / "1"), rows_of(run_dir)), ours, rtol=1e-6)
    for size in (2, 3):
        ranks(size, run_export, "--checkpoint", run_dir, "--merge", "--out", tmp_path / str(size))
        alone, together = weights_of(tmp_path / "1"), weights_of(tmp_path / str(size))
        assert alone.keys() == together.keys()
        for name, weight in alone.items():  # the order of a product's sum depends on the rows of a rank
            torch.testing.assert_close(together[name], weight, rtol=1e-6, atol=1e-7)
    before = weights_of(model)
    assert {name: weight.shape for name, weight in alone.items()} == {name: w.shape for name, w in before.items()}
    assert json.loads((tmp_path / "1" / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path / "1").architectures == AutoConfig.from_pretrained(model).architectures


@pytest.mark.parametrize(("family", "keys"), [("llama", {}), ("gpt2", {"lora__dora": True})])
def test_a_folder_of_adapters_merges_as_its_run_does(runs: Any, tmp_path: Path, family: str, keys: Any) -> None:
    _, run_dir = runs(family, **keys)
    assert run_export("--checkpoint", run_dir, "--merge", "--out", tmp_path / "run") == 0
    assert run_export("--adapter", run_dir / "final", "--merge", "--out", tmp_path / "adapter") == 0
    own, other = contents(tmp_path / "run"), contents(tmp_path / "adapter")
    card = other.pop("README.md").decode()
    assert other == {name: content for name, content in own.items() if name != "README.md"}
    assert card.startswith("---\n") and "# adapter\n" in card and "`run/final` (rank 3, alpha 5, " in card


def test_adapters_of_others_with_another_base(runs: Any, tmp_path: Path) -> None:
    """peft's own folder, whose base is elsewhere: the model is what peft computes by it."""
    base = plain_model(save_model(tmp_path / "base", "llama", seed=4))
    peft = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(tmp_path / "adapter")
    words = ("--adapter", tmp_path / "adapter", "--base", tmp_path / "base", "--merge", "--out", tmp_path / "out")
    path = tmp_path / "adapter" / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "of/nobody"}))
    assert run_export(*words) == 0
    rows = rows_of(runs("llama")[1])
    plain = PeftModel.from_pretrained(plain_model(tmp_path / "base"), tmp_path / "adapter").eval()
    np.testing.assert_allclose(pair_logps(plain_model(tmp_path / "out"), rows), pair_logps(plain, rows), rtol=1e-6)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts(is_transposed: bool) -> None:
    """Weights (E, outputs, inputs) and (E, inputs, outputs): what peft adds to them, in float64."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed = is_transposed
            self.gate_up_proj = nn.Parameter(torch.randn(3, 5, 7, dtype=torch.float64))
            self.down_proj = nn.Parameter(torch.randn(3, 7, 4, dtype=torch.float64))

    model = nn.ModuleDict({"experts": Experts()})
    names = ["experts.gate_up_proj", "experts.down_proj"]
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=names))
    layers = [module for module in peft.modules() if isinstance(module, ParamWrapper)]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
    merged = dict(merged_weights(peft.base_model.model, torch.float64))
    assert set(merged) == set(names)
    for layer in layers:
        wanted = layer.get_param() + layer.get_delta_weight("default")
        torch.testing.assert_close(merged[f"experts.{layer.parameter_name}"], wanted, rtol=1e-12, atol=1e-12)


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_the_merged_model_has_the_dtype_of_its_base(tmp_path: Path) -> None:
    """bfloat16: the sum in float32 is rounded once, also after a run that computed in bfloat16."""
    model = save_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    run_dir = run(adapter_config(model, tmp_path / "run", parallel__compute_dtype="bfloat16"))
    assert run_export("--checkpoint", run_dir, "--merge", "--out", tmp_path / "half") == 0
    assert run_export("--checkpoint", run_dir, "--merge", "--dtype", "float32", "--out", tmp_path / "full") == 0
    half, full = weights_of(tmp_path / "half"), weights_of(tmp_path / "full")
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)
    peft = PeftModel.from_pretrained(plain_model(model), run_dir / "final").eval()
    rows = rows_of(run_dir)
    np.testing.assert_allclose(pair_logps(plain_model(tmp_path / "full"), rows), pair_logps(peft, rows), rtol=1e-6)


def test_a_base_in_float32_is_not_rounded_to_the_compute_dtype(tmp_path: Path) -> None:
    """Weights without adapters are those of the base, to the last bit."""
    model = save_model(tmp_path / "model", "llama")
    run_dir = run(adapter_config(model, tmp_path / "run", parallel__compute_dtype="bfloat16"))
    assert run_export("--checkpoint", run_dir, "--merge", "--out", tmp_path / "out") == 0
    before, after = weights_of(model), weights_of(tmp_path / "out")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "_proj" not in name} <= same and len(same) < len(before)


# --- without --merge -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_exported_as_adapters(runs: Any, tmp_path: Path, ranks: Ranks) -> None:
    """The bytes of final/, on one rank and on two; those of the step before differ."""
    _, run_dir = runs("llama", lora__dora=True)
    assert run_export("--checkpoint", run_dir, "--out", tmp_path / "one") == 0
    assert ranks(2, run_export, "--checkpoint", run_dir, "--out", tmp_path / "two") == [0, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(run_dir / "final")
    assert run_export("--checkpoint", checkpoint_path(run_dir, 1), "--out", tmp_path / "first") == 0
    assert contents(tmp_path / "first")[ADAPTER_TENSORS] != contents(run_dir / "final")[ADAPTER_TENSORS]


def test_the_base_is_not_read_for_adapters_alone(runs: Any, tmp_path: Path) -> None:
    """A base of other weights in the same place: its adapters are what they were; to merge them is refused."""
    model, run_dir = runs("llama")
    shutil.copytree(run_dir.parent, tmp_path / "moved")
    text = (tmp_path / "moved" / "run" / "config.yaml").read_text()
    (tmp_path / "moved" / "run" / "config.yaml").write_text(text.replace(str(model), str(tmp_path / "moved" / "model")))
    save_model(tmp_path / "moved" / "model", "llama", seed=9)
    words = ("--checkpoint", tmp_path / "moved" / "run", "--out")
    assert run_export(*words, tmp_path / "out") == 0
    assert contents(tmp_path / "out")[ADAPTER_TENSORS] == contents(run_dir / "final")[ADAPTER_TENSORS]
    assert run_export(*words, tmp_path / "merged", "--merge") == 2 and not (tmp_path / "merged").exists()


def test_the_adapters_of_a_checkpoint_are_those_of_its_run() -> None:
    """By what state.json records, since the folder of lora.path may be gone: every field of a spec but the folder. Each
    is found by a key of the config. A run without adapters has none.
    """
    spec = AdapterSpec(
        rank=4,
        alpha=6.0,
        target_modules=("k_proj", "q_proj"),
        target_parameters=("experts.down_proj",),
        exclude_modules="layers.0.*",
        rslora=True,
        dora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 3.0},
        layers_to_transform=(1, 2),
        layers_pattern=("layers",),
        trained_modules=("lm_head",),
        ties=True,
        embeddings=True,
        quantize="nf4",
        of_peft=True,
        folder=Path("sft"),
    )
    assert all(getattr(spec, field.name) != field.default for field in fields(spec)), "no field is forgotten"
    inputs: Any = SimpleNamespace(model=SimpleNamespace(adapters=spec, base_hash="0"))
    assert recorded_adapters(json.loads(json.dumps(adapter_facts(inputs)))) == replace(spec, folder=None)
    assert set(adapter_facts(inputs)) <= set(KEYS)
    assert recorded_adapters(NO_ADAPTERS) is None and recorded_adapters({}) is None


# --- the command line ------------------------------------------------------------------------------------------------


def test_wrong_words(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each one line, exit code 2, and nothing written."""
    model, run_dir = runs("llama")
    full = run(adapter_config(model, tmp_path / "full", lora__rank=None, lora__alpha=None))
    final = run_dir / "final"
    (tmp_path / "nameless").mkdir()
    (tmp_path / "nameless" / ADAPTER_CONFIG).write_text("{}")
    (tmp_path / "nameless" / ADAPTER_TENSORS).write_bytes(b"")
    cases = {
        f"--merge: the run of {checkpoint_path(full, 2)} has no adapters; valid: without --merge": (
            *("--checkpoint", full, "--merge"),
        ),
        f"--checkpoint: {final} holds adapters; valid: --adapter {final} --merge adds them to their base": (
            *("--checkpoint", final, "--merge"),
        ),
        f"--adapter: {final} holds adapters already; valid: with --merge": ("--adapter", final),
        "--base: the config of a checkpoint names its model; valid: with --adapter": (
            *("--checkpoint", run_dir, "--base", model),
        ),
        f"--adapter: {model} has config.json: it is a whole model; valid: a folder with adapter_config.json": (
            *("--adapter", model, "--merge"),
        ),
        f"--adapter: no such folder: {tmp_path / 'nowhere'}": ("--adapter", tmp_path / "nowhere", "--merge"),
        f"--adapter: {tmp_path} holds no adapters": ("--adapter", tmp_path, "--merge"),
        f"{ADAPTER_CONFIG} names no base_model_name_or_path; valid: with --base MODEL": (
            *("--adapter", tmp_path / "nameless", "--merge"),
        ),
        "--base: no such folder: ./nowhere": ("--adapter", final, "--merge", "--base", "./nowhere"),
        "one of the arguments --checkpoint --adapter is required": ("--merge",),
    }
    capsys.readouterr()
    for what, words in cases.items():
        assert run_export(*words, "--out", tmp_path / "out") == 2, what
        (error,) = error_lines(capsys.readouterr().err)
        assert what in error
    assert not (tmp_path / "out").exists()
