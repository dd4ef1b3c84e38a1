"""Runs for tests: a config in one call, training in this process or on ranks, and its metrics."""

import dataclasses
import math
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dpo.base.errors import RunError
from dpo.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ReferenceConfig,
    SourceConfig,
    TrainConfig,
    to_yaml,
)
from dpo.distributed.program import run_program
from dpo.distributed.startup import open_world
from dpo.run.folder import Start
from dpo.run_folder.files import LOCK, LOG, read_metrics
from dpo.train import loop, program
from dpo.train.start import find_start_together
from tests.support.models import save_model, save_pairs

CLOCK = (
    "step_seconds",
    "pairs_per_second",
    "tokens_per_second",
    "peak_memory_bytes",
    "padding_fraction",
    "mfu",
    "reference/seconds",
)
"""Ends of the names of metrics that measure the machine or the layout, not the mathematics."""


def make_config(model: Path | str, train: Path | str, run_dir: Path | str, **changes: Any) -> Config:
    """A config with the defaults; `changes` are keys like `optim__lr=1e-3`."""
    config = Config(
        model=ModelConfig(path=str(model)),
        reference=ReferenceConfig(),
        data=DataConfig(train=[SourceConfig(path=str(train))], num_proc=1),
        batch=BatchConfig(),
        loss=LossConfig(),
        optim=OptimConfig(),
        parallel=ParallelConfig(timeout_seconds=120),
        train=TrainConfig(run_dir=str(run_dir)),
        checkpoint=CheckpointConfig(),
    )
    return changed(config, **changes)


def changed(config: Config, **changes: Any) -> Config:
    """The config with keys like `optim__lr=1e-3` changed."""
    for key, value in changes.items():
        section, name = key.split("__")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def save_six_steps(root: Path) -> Path:
    """model/, eight pairs in pairs.jsonl and two in eval.jsonl: what `six_steps` runs on."""
    save_model(root / "model", "llama")
    save_pairs(root / "pairs.jsonl", 8)
    save_pairs(root / "eval.jsonl", 2, seed=1)
    return root


def six_steps(root: Path, run_dir: Path | str, **changes: Any) -> Config:
    """A run of six quick steps on model/, pairs.jsonl and eval.jsonl in `root`, whose cache it shares with others: a
    checkpoint after 2, 4 and 6, evaluations after 0, 3 and 6.
    """
    facts = {
        "batch__pairs_per_step": 4,
        "train__steps": 6,
        "train__eval_every": 3,
        "optim__lr": 1e-3,
        "optim__warmup_steps": 0,
        "checkpoint__save_every": 2,
        "checkpoint__keep": None,
        "reference__cache_dir": str(root / "cache"),
        "data__eval": [SourceConfig(str(root / "eval.jsonl"))],
    }
    return make_config(root / "model", root / "pairs.jsonl", run_dir, **(facts | changes))


def train_lines(run_dir: Path | str) -> list[dict[str, float]]:
    """The lines of a run's training steps."""
    return [line for line in read_metrics(Path(run_dir)) if "train/loss" in line]


def eval_lines(run_dir: Path | str) -> list[dict[str, float]]:
    """The lines of a run's evaluations."""
    return [line for line in read_metrics(Path(run_dir)) if "eval/loss" in line]


def logged(run_dir: Path | str) -> list[str]:
    """The lines of a run's log without their time stamps."""
    lines = Path(run_dir, LOG).read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines), lines
    return [line[21:] for line in lines]


def has_log_alone(run_dir: Path | str) -> bool:
    """Whether a start ended after its input was checked and before its first step. A killed one leaves its lock."""
    return {path.name for path in Path(run_dir).iterdir()} - {LOCK} == {LOG}


def without_clock(lines: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The lines without what measures the machine or the layout."""
    return [{name: value for name, value in line.items() if not name.endswith(CLOCK)} for line in lines]


def worst_relative(
    lines: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]], names: Sequence[str]
) -> float:
    """The greatest |a - b| / max(|a|, |b|) of some metrics over all lines; inf where the lines do not match."""
    if [line["step"] for line in lines] != [line["step"] for line in others]:
        return math.inf
    pairs = [(a[name], b[name]) for a, b in zip(lines, others, strict=True) for name in names]
    return max((abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in pairs), default=math.inf)


def find_start(config: Config) -> Start:
    """The start that this process alone finds."""
    with open_world(60) as world:
        return find_start_together(config, world)


def afresh(config: Config, **changes: object) -> Config:
    """The config with keys like `optim__lr` changed and, unless one is given, a fresh run folder."""
    count = len(list(Path(str(config.train.run_dir)).parent.iterdir()))
    return changed(config, **({"train__run_dir": f"{config.train.run_dir}-{count}"} | changes))


def cache_folders(tmp_path: Path) -> list[Path]:
    """The folders in a test's reference cache, one a reference and numerics."""
    return sorted((tmp_path / "reference-cache").iterdir())


def run(config: Config) -> Path:
    """Trains in this process as one rank; the run folder. Raises what `run_training` raises."""
    try:
        program.run_training(config)
    finally:
        _leave_group()
    return Path(str(config.train.run_dir))


def run_until(config: Config, step: int) -> Path:
    """A run whose machine fails before this step; on ranks of a pool too. The run folder."""
    step_of_a_run = loop._step

    def fail(run: Any, number: int, *others: Any) -> Any:
        if number == step:
            raise RunError("the power is gone")
        return step_of_a_run(run, number, *others)

    try:
        with patch.object(loop, "_step", fail):
            run(config)
    except RunError as failure:
        assert str(failure) == "the power is gone", failure
        return Path(str(config.train.run_dir))
    raise AssertionError(f"the run never came to step {step}")


def exit_code(config: Config, *words: str) -> int:
    """The exit code of `python -m dpo.train` with this config and further words, in this process; stderr gets what a
    user would see.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(to_yaml(config))
        return exit_code_of(program.main, "dpo.train", "--config", str(file), *words)


def exit_code_of(main: Callable[[], None], *argv: str) -> int:
    """The exit code of a program of this package with this command line, in this process."""
    try:
        with patch.object(sys, "argv", list(argv)):
            return run_program(main)
    finally:
        _leave_group()


def _leave_group() -> None:
    """A program that failed leaves its group to `run_program`; the next one in this process needs a new one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def reference_line(run_dir: Path | str) -> tuple[int, int]:
    """(rows computed, rows reused) of the run's last reference pass."""
    line = [line for line in read_metrics(Path(run_dir)) if "reference/seconds" in line][-1]
    return int(line["reference/rows_computed"]), int(line["reference/rows_reused"])


def weights_of(folder: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of an exported model by name."""
    return load_file(Path(folder) / "model.safetensors")


def same_weights(folder: Path | str, other: Path | str) -> bool:
    """Whether two exported models are equal to the last bit."""
    mine, theirs = weights_of(folder), weights_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of everything in a folder."""
    facts = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (fact.st_size, fact.st_mtime_ns) for path, fact in facts.items()}


def error_lines(stderr: str) -> list[str]:
    """The lines that say why a program ended, with CONFIG for the path of `exit_code`'s file."""
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    return [re.sub(r"^error: \S+/config\.yaml: ", "error: CONFIG: ", line) for line in lines]
