"""Checkpoints of runs with adapters: what they hold, that a run goes on from them, and what must not change."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.checkpoint.folders import checkpoint_path
from dpo.checkpoint.metadata import open_reader
from dpo.config import Config
from dpo.hub.files import ADAPTER_TENSORS
from tests.faults.worlds import SECONDS, dies_in_step_4, start_world
from tests.support.models import save_model
from tests.support.peft_models import save_adapter
from tests.support.ranks import Ranks
from tests.support.runs import (
    changed,
    error_lines,
    eval_lines,
    exit_code,
    run,
    run_until,
    save_six_steps,
    six_steps,
    train_lines,
    without_clock,
    worst_relative,
)

pytestmark = pytest.mark.xdist_group("ranks")

ADAMW = {"optim__name": "adamw", "optim__weight_decay": 0.1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_six_steps(tmp_path_factory.mktemp("lora"))


def config_of(root: Path, run_dir: Path, **changes: Any) -> Config:
    return six_steps(root, run_dir, **({"lora__rank": 3} | ADAMW | changes))


def stored(folder: Path) -> dict[str, int]:
    """The elements of each tensor of a checkpoint."""
    metadata = open_reader(folder).read_metadata()
    return {name: tensor.size.numel() for name, tensor in metadata.state_dict_metadata.items()}


def same_run(whole: Path, parts: Path) -> bool:
    """Whether all lines but the clock's and the adapters at the end are equal, to the last bit."""
    lines, others = ([train_lines(folder), eval_lines(folder)] for folder in (whole, parts))
    assert len(others[0]) == 6
    same = [without_clock(part) for part in lines] == [without_clock(part) for part in others]
    return same and (whole / "final" / ADAPTER_TENSORS).read_bytes() == (parts / "final" / ADAPTER_TENSORS).read_bytes()


# --- content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "beside"),
    [({}, 0), ({"lora__dora": True}, 2 * 224), ({"lora__train_embeddings": True}, 2 * 97 * 32)],
)
def test_a_checkpoint_holds_what_is_trained(root: Path, tmp_path: Path, changes: dict[str, Any], beside: int) -> None:
    """In each of two layers A has 3 x 32 numbers six times and 3 x 48 once, and B 3 for each of 224 outputs; a DoRA
    magnitude one for each. AdamW keeps two numbers for each of these, and a step for each tensor. That is all.
    """
    run(config_of(root, tmp_path / "run", train__steps=2, train__eval_every=None, **changes))
    sizes = stored(checkpoint_path(tmp_path / "run", 2))
    trained = 2 * (3 * (6 * 32 + 48) + 3 * 224) + beside
    weights = {name: size for name, size in sizes.items() if name.startswith("model.")}
    assert sum(weights.values()) == trained
    assert sum(sizes.values()) == 3 * trained + len(weights)
    assert not [name for name in sizes if "base_layer" in name or "norm" in name]


# --- resumed ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama-tied", {}),
    "gpt2, dora": ("gpt2", {"lora__dora": True}),
    "offloaded": ("llama", {"parallel__cpu_offload": True}),
    "llama-tied, embeddings": ("llama-tied", {"lora__train_embeddings": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    """Of models whose head is the embedding, frozen or trained, too."""
    family, changes = KINDS[kind]
    root = save_six_steps(tmp_path)
    shutil.rmtree(root / "model")
    save_model(root / "model", family)
    whole = run(config_of(root, tmp_path / "whole", **changes))
    parts = run_until(config_of(root, tmp_path / "parts", **changes), 4)
    assert run(config_of(root, parts, **changes)) == parts
    assert same_run(whole, parts)


def test_killed_while_it_trains(root: Path, tmp_path: Path) -> None:
    """One of two ranks, of a run that starts from an SFT adapter."""
    adapter = save_adapter(tmp_path / "adapter", root / "model")
    start = {"lora__rank": None, "lora__path": str(adapter)}
    whole, parts = (config_of(root, tmp_path / name, **start) for name in ("whole", "parts"))
    assert start_world(whole).wait() == [0, 0]
    world = start_world(parts, arrange=dies_in_step_4)
    world.ranks[1].join(SECONDS)
    assert world.ranks[1].exitcode == -signal.SIGKILL
    world.end()
    assert start_world(parts).wait() == [0, 0]
    assert same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_another_number_of_ranks_goes_on(ranks: Ranks, root: Path, tmp_path: Path, before: int, after: int) -> None:
    """Losses and norms to 1e-5."""
    dora = {"lora__dora": True, "optim__lr": 1e-4}
    ranks(before, run, config_of(root, tmp_path / "whole", **dora))
    ranks(before, run_until, config_of(root, tmp_path / "parts", **dora), 4)
    ranks(after, run, config_of(root, tmp_path / "parts", **dora))
    lines, others = (train_lines(tmp_path / name) for name in ("whole", "parts"))
    assert len(lines) == 6
    assert worst_relative(lines, others, ["train/loss", "train/grad_norm", "train/logps/chosen"]) <= 1e-5


# --- refused ---------------------------------------------------------------------------------------------------------


def refusal(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    """The key of the error with which a start is refused as the user's; empty where it is not."""
    code = exit_code(config)
    lines = error_lines(capsys.readouterr().err)
    assert (code, len(lines)) in ((0, 0), (2, 1)), lines
    return lines[0].removeprefix("error: ").removeprefix("CONFIG: ").split(": ")[0] if lines else ""


CHANGED: dict[str, dict[str, Any]] = {
    "lora.rank": {"lora__rank": 4, "lora__alpha": 6.0},
    "lora.alpha": {"lora__alpha": 7.0},
    "lora.target_modules": {"lora__target_modules": ["q_proj"]},
    "lora.exclude_modules": {"lora__exclude_modules": "down_proj"},
    "lora.rslora": {"lora__rslora": True},
    "lora.dora": {"lora__dora": True},
    "lora.train_embeddings": {"lora__train_embeddings": True},
    "train.seed": {"train__seed": 5},
}


@pytest.mark.parametrize("loss", ["dpo", "simpo", "orpo"])
def test_what_must_be_the_same_on_resume(
    root: Path, tmp_path: Path, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each change alone is refused by its key, also where the loss has no reference; what is told is not."""
    losses = {"dpo": {}, "simpo": {"loss__name": "simpo", "loss__gamma": 0.5}, "orpo": {"loss__name": "orpo"}}
    config = config_of(root, tmp_path / "run", **losses[loss])
    run_until(config, 3)
    capsys.readouterr()
    for key, change in CHANGED.items():
        assert refusal(changed(config, **change), capsys) == key
    other = shutil.copytree(root / "model", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"].view(torch.int32)[0] ^= 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert refusal(changed(config, model__path=str(other)), capsys) == "model.path"
    assert refusal(changed(config, lora__rank=None), capsys) == "lora.rank"
    moved = shutil.copytree(root / "model", tmp_path / "moved")
    same = changed(
        config, model__path=str(moved), lora__target_modules="all-linear", lora__alpha=6.0, lora__rslora=False
    )
    assert refusal(same, capsys) == ""
    assert len(train_lines(tmp_path / "run")) == 6


def test_a_full_run_does_not_go_on_with_adapters(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(root, tmp_path / "run", lora__rank=None)
    run_until(config, 3)
    capsys.readouterr()
    assert refusal(changed(config, lora__rank=3), capsys) == "lora.rank"
    assert refusal(config, capsys) == ""


def test_values_of_a_folder_must_be_the_same(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tensors, in another order of names: the run goes on. With another alpha: it does not."""
    adapter = save_adapter(tmp_path / "adapter", root / "model", target_modules=["q_proj", "v_proj"])
    config = config_of(root, tmp_path / "run", lora__rank=None, lora__path=str(adapter), loss__name="orpo")
    run_until(config, 3)
    capsys.readouterr()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 6}))
    assert refusal(config, capsys) == "lora.alpha"
    reordered = settings | {"target_modules": settings["target_modules"][::-1]}
    (adapter / "adapter_config.json").write_text(json.dumps(reordered))
    assert refusal(config, capsys) == ""
