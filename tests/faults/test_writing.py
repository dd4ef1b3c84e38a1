"""While a thread writes a checkpoint, training goes on, fails, is preempted or loses a rank."""

import contextlib
import io
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed.checkpoint as dcp

from dpo.checkpoint import saver as saving
from dpo.checkpoint.folders import checkpoint_path
from dpo.config import Config
from dpo.distributed.program import run_program
from dpo.train import loop
from dpo.train import program as train
from tests.faults.late import written_late
from tests.faults.test_one_rank_fails import fail_as_rank, infinite_loss
from tests.faults.test_preemption import preempted
from tests.support.checkpoints import newest_checkpoint
from tests.support.ranks import Ranks
from tests.support.runs import (
    changed,
    error_lines,
    exit_code,
    run,
    same_weights,
    save_six_steps,
    six_steps,
    train_lines,
    without_clock,
)

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl, eval.jsonl."""
    return save_six_steps(tmp_path_factory.mktemp("writing"))


def names(run_dir: Path) -> list[str]:
    """What lies among the checkpoints."""
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


# --- training goes on ------------------------------------------------------------------------------------------------


def train_and_look(config: Config) -> list[list[str]]:
    """A run whose checkpoints are written late; the checkpoints that each step finds."""
    found: list[list[str]] = []
    step = loop._step

    def looking(*args: Any) -> Any:
        found.append(names(Path(str(config.train.run_dir))))
        return step(*args)

    with written_late(), patch.object(loop, "_step", looking):
        run(config)
    return found


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_a_checkpoint_is_of_its_step_however_late_it_is_written(
    root: Path, ranks: Ranks, tmp_path: Path, optimizer: str, size: int
) -> None:
    """The checkpoint after step 2 is written when step 4 is done, and steps 3 to 6 made from it are the same to the
    last bit: the copy is not what training goes on with.
    """
    config = six_steps(root, tmp_path / "run", optim__name=optimizer)
    two, four = "step-000002", "step-000004"
    for found in ranks(size, train_and_look, config):
        assert found == [[], [], [], [], [two], [two]]
    assert names(tmp_path / "run") == [two, four, "step-000006"]
    resume = str(checkpoint_path(tmp_path / "run", 2))
    again = changed(config, train__run_dir=str(tmp_path / "again"), checkpoint__resume=resume)
    ranks(size, run, again)
    assert without_clock(train_lines(tmp_path / "again")) == without_clock(train_lines(tmp_path / "run"))[2:]
    assert same_weights(tmp_path / "run/final", tmp_path / "again/final")


# --- it fails --------------------------------------------------------------------------------------------------------


def fail_late(config: Config, fault: str, rank: int) -> tuple[int, str, int]:
    with written_late():
        return fail_as_rank(config, fault, rank)


@contextlib.contextmanager
def full_once() -> Iterator[None]:
    """This rank's disk takes nothing of the first checkpoint."""
    write, calls = dcp.FileSystemWriter.write_data, []

    def write_data(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return write(*args)

    with patch.object(dcp.FileSystemWriter, "write_data", write_data):
        yield


def exit_code_full_once(config: Config, rank: int) -> tuple[int, str]:
    stderr = io.StringIO()
    disk = full_once() if int(os.environ["RANK"]) == rank else contextlib.nullcontext()
    with disk, contextlib.redirect_stderr(stderr):
        return exit_code(config), stderr.getvalue()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_write_that_fails_once_is_told_and_the_next_one_made(
    root: Path, ranks: Ranks, tmp_path: Path, rank: int
) -> None:
    (code, said), (other_code, other_said) = ranks(2, exit_code_full_once, six_steps(root, tmp_path / "run"), rank)
    assert (code, other_code, error_lines(said), other_said) == (0, 0, [], "")
    told = [line for line in said.splitlines() if "a checkpoint was not written" in line]
    assert len(told) == 1
    assert re.search(r"step-000002\.tmp, [\d.]+ KiB in all: ", told[0])
    assert f"a checkpoint was not written: the disk is full: rank {rank} cannot write " in told[0]
    assert names(tmp_path / "run") == ["step-000004", "step-000006"]
    assert (tmp_path / "run/final").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_write_that_fails_at_the_end(root: Path, ranks: Ranks, tmp_path: Path, rank: int) -> None:
    """The only checkpoint, that of the last step: no model is exported, as if the run were done."""
    config = six_steps(root, tmp_path / "run", checkpoint__save_every=None)
    (code, said, updates), (other_code, other_said, _) = ranks(2, fail_as_rank, config, "full_checkpoints", rank)
    (error,) = error_lines(said)
    assert error.startswith(f"error: the disk is full: rank {rank} cannot write ") and re.search(
        r"step-000006\.tmp, [\d.]+ KiB in all: ", error
    )
    assert (code, other_code, updates, error_lines(other_said)) == (1, 1, 6, [])
    assert not (tmp_path / "run/final").exists()
    assert newest_checkpoint(tmp_path / "run") is None


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_being_written_when_the_run_fails_is_written_to_its_end(
    root: Path, ranks: Ranks, tmp_path: Path, rank: int
) -> None:
    """Step 2's gradient is not finite while the good checkpoint after step 1 waits to be written."""
    config = six_steps(root, tmp_path / "run", checkpoint__save_every=1)
    for code, _, updates in ranks(2, fail_late, config, "infinite_loss", rank):
        assert (code, updates) == (1, 1)
    assert names(tmp_path / "run") == ["step-000001"]
    assert newest_checkpoint(tmp_path / "run") == checkpoint_path(tmp_path / "run", 1)


def test_a_run_that_fails_says_that_its_checkpoint_failed_too(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    config = six_steps(root, tmp_path / "run", checkpoint__save_every=1)
    with patch.object(dcp.FileSystemWriter, "write_data", full), infinite_loss():
        assert exit_code(config) == 1
    said = capsys.readouterr().err
    assert "the gradient is not finite" in error_lines(said)[0]
    assert "WARNING: the last checkpoint was not written: the disk is full: rank 0 cannot write " in said


def test_a_run_that_fails_does_not_wait_for_ever(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk answers no more: the run ends after `parallel.timeout_seconds`."""
    released = threading.Event()
    config = six_steps(root, tmp_path / "run", checkpoint__save_every=1, parallel__timeout_seconds=1)
    with patch.object(saving, "write_checkpoint", lambda *args: released.wait()), infinite_loss():
        assert exit_code(config) == 1
    assert "the last checkpoint was not written: it took over 1 seconds" in capsys.readouterr().err
    released.set()


# --- preemption ------------------------------------------------------------------------------------------------------


def preempted_late(config: Config, status: Path) -> tuple[int, dict[str, Any]]:
    with written_late():
        return preempted(config, "dpo.train.loop.train_step", 3, status)


def test_preemption_waits_for_both_checkpoints(root: Path, ranks: Ranks, tmp_path: Path) -> None:
    """The signal comes within step 3, while the checkpoint after step 2 still waits to be written."""
    config = six_steps(root, tmp_path / "run")
    answers = ranks(2, preempted_late, config, tmp_path / "status.json")
    assert answers == [(0, {"state": "preempted", "step": 3, "saved": True})] * 2
    assert names(tmp_path / "run") == ["step-000002", "step-000003"]
    assert newest_checkpoint(tmp_path / "run") == checkpoint_path(tmp_path / "run", 3)


def preempted_full_once(config: Config, status: Path) -> tuple[int, dict[str, Any]]:
    disk = full_once() if os.environ["RANK"] == "1" else contextlib.nullcontext()
    with disk:
        return preempted(config, "dpo.train.loop.train_step", 3, status)


def test_a_preempted_run_saves_though_the_write_before_failed(root: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Rank 1 could not write the checkpoint after step 2; the signal comes within step 3."""
    answers = ranks(2, preempted_full_once, six_steps(root, tmp_path / "run"), tmp_path / "status.json")
    assert answers == [(0, {"state": "preempted", "step": 3, "saved": True})] * 2
    assert names(tmp_path / "run") == ["step-000003"]


def full_when_preempted(config: Config, status: Path) -> tuple[int, str]:
    """Rank 1 is asked to stop within step 1, and cannot write what it then saves."""

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    is_here = os.environ["RANK"] == "1"
    disk = patch.object(dcp.FileSystemWriter, "write_data", full) if is_here else contextlib.nullcontext()
    stderr = io.StringIO()
    status.write_text("{}")
    with disk, contextlib.redirect_stderr(stderr):
        code, _ = preempted(config, "dpo.train.loop.train_step", 1, status)
    return code, stderr.getvalue()


def test_a_preempted_run_that_cannot_save_says_so(root: Path, ranks: Ranks, tmp_path: Path) -> None:
    config = six_steps(root, tmp_path / "run")
    (code, said), (other_code, _) = ranks(2, full_when_preempted, config, tmp_path / "status.json")
    assert (code, other_code) == (1, 1)
    (error,) = error_lines(said)
    assert error.startswith("error: the disk is full: rank 1 cannot write ") and re.search(
        r"step-000001\.tmp, [\d.]+ KiB in all: ", error
    )


# --- a rank is gone --------------------------------------------------------------------------------------------------


def die_while_writing(config: Config) -> int:
    """Rank 1 is gone when it should write."""
    if os.environ["RANK"] == "1":
        with patch.object(saving, "write_checkpoint", lambda *args: os._exit(9)):
            return run_program(lambda: train.run_training(config))
    return run_program(lambda: train.run_training(config))


def test_a_rank_that_dies_while_it_writes_is_not_waited_for(root: Path, tmp_path: Path) -> None:
    """Rank 0 ends by itself, which tells in one line that it lost the other; the next start begins anew, since nothing
    was committed.
    """
    ranks = Ranks()
    config = six_steps(root, tmp_path / "run")
    with pytest.raises(AssertionError, match=r"^rank 1:\nthe process died"):
        ranks(2, die_while_writing, config)
    assert newest_checkpoint(tmp_path / "run") is None
    assert [line["step"] for line in train_lines(run(config))] == [1, 2, 3, 4, 5, 6]
