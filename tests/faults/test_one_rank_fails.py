"""What goes wrong on one rank ends all of them, with exit code 1, one line, and nothing half-done."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dpo.config import Config
from dpo.distributed.program import run_program
from dpo.step import update
from dpo.train import program as train
from tests.support.checkpoints import newest_checkpoint
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import changed, exit_code, make_config, run, train_lines

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Four steps, a checkpoint every second."""
    return make_config(
        save_model(tmp_path / "model", "llama"),
        save_pairs(tmp_path / "pairs.jsonl", 8),
        tmp_path / "run",
        batch__pairs_per_step=4,
        train__steps=4,
        optim__lr=1e-3,
        optim__warmup_steps=0,
        checkpoint__save_every=2,
    )


def fail_as_rank(config: Config, fault: str, rank: int) -> tuple[int, str, int]:
    """Trains as a rank of two, with a fault on `rank`: (exit code, stderr, updates of the weights)."""
    is_here = int(os.environ["RANK"]) == rank
    updates, update = [], torch.optim.RMSprop.step
    counted = patch.object(torch.optim.RMSprop, "step", lambda *a, **k: (updates.append(1), update(*a, **k))[1])
    stderr = io.StringIO()
    with counted, contextlib.redirect_stderr(stderr), FAULTS[fault]() if is_here else contextlib.nullcontext():
        code = run_program(lambda: train.run_training(config))
    return code, stderr.getvalue(), len(updates)


def infinite_loss() -> Any:
    """The second step's losses are infinite: its gradient is not finite."""
    losses, calls = update.pair_losses, []

    def infinite(*args: Any) -> Any:
        calls.append(1)
        values, rewards = losses(*args)
        return (values * torch.inf if len(calls) == 2 else values), rewards

    return patch.object(update, "pair_losses", infinite)


def full_cache() -> Any:
    """On the way, not at the end: a block is written after every chunk."""
    write = Mock(side_effect=OSError(28, "No space left on device"))
    return patch.multiple("dpo.ref_logps.fill", SECONDS_BETWEEN_BLOCKS=-1, write_rows=write)


def full_checkpoints() -> Any:
    return patch.object(dcp.FileSystemWriter, "write_data", side_effect=OSError(28, "No space left on device"))


def full_run_folder() -> Any:
    return patch("dpo.checkpoint.store.write_marker", side_effect=OSError(28, "No space left on device"))


FAULTS = {f.__name__: f for f in (infinite_loss, full_cache, full_checkpoints, full_run_folder)}

CASES = [
    ("infinite_loss", 0, "error: step 2: the gradient is not finite: rank 0, micro-batch 1: pairs ", 1),
    ("infinite_loss", 1, "error: step 2: the gradient is not finite: rank 1, micro-batch 1: pairs ", 1),
    ("full_cache", 0, "error: the disk is full", 0),
    ("full_checkpoints", 0, "full: rank 0 cannot write RUN/checkpoints/step-000004.tmp, 169.8 KiB in all: ", 4),
    ("full_checkpoints", 1, "full: rank 1 cannot write RUN/checkpoints/step-000004.tmp, 169.8 KiB in all: ", 4),
    ("full_run_folder", 0, "the disk is full: cannot write RUN/checkpoints/step-000004, at least 1 byte: ", 4),
]


@pytest.mark.parametrize("fault, rank, line, updates", CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_a_fault_on_one_rank_ends_both(
    config: Config, ranks: Ranks, tmp_path: Path, fault: str, rank: int, line: str, updates: int
) -> None:
    """Both end with 1 after the same number of updates; rank 0 alone says why; the next start goes on.

    A checkpoint that could not be written after step 2 does not end them, but the next one, after step 4, does.
    """
    (code, said, steps), (other_code, other_said, other_steps) = ranks(2, fail_as_rank, config, fault, rank)
    assert (code, other_code) == (1, 1)
    errors = [text for text in said.splitlines() if text.startswith("error:")]
    assert len(errors) == 1
    assert line.replace("RUN", str(tmp_path / "run")) in errors[0]
    assert "error:" not in other_said
    assert steps == other_steps == updates
    assert newest_checkpoint(tmp_path / "run") is None
    assert [entry["step"] for entry in train_lines(run(config))] == [1, 2, 3, 4]


def test_weights_that_ran_away_stop_the_run(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate of 1e30 makes the first update send every weight to 1e31: the second gradient is no number."""
    assert exit_code(changed(config, optim__lr=1e30)) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert error.startswith("error: step 2: the gradient is not finite: rank 0, micro-batch 1: pairs ")
    assert newest_checkpoint(Path(str(config.train.run_dir))) is None
