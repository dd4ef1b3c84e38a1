"""SIGUSR2 to one rank: all stop after the same step, save, end with 0; the run that goes on equals one left alone."""

import errno
import json
import os
import pkgutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dpo.base.errors import Preempted
from dpo.board.writer import MetricsWriter
from dpo.command.status import STATUS_FILE
from dpo.config import Config
from dpo.distributed.program import run_program
from dpo.run_folder.files import read_metrics
from dpo.step.evaluation import Evaluation
from dpo.step.update import train_step
from dpo.train import loop, outputs
from dpo.train import program as train
from tests.support.checkpoints import newest_checkpoint
from tests.support.ranks import Ranks
from tests.support.runs import (
    eval_lines,
    has_log_alone,
    logged,
    reference_line,
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
    """model/, pairs.jsonl, eval.jsonl, and what a run of six steps on two ranks gives when nothing disturbs it."""
    root = tmp_path_factory.mktemp("preemption")
    save_six_steps(root)
    return root


def ask_to_stop(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGUSR2)


def preempted(config: Config, target: str, number: int, status: Path) -> tuple[int, dict[str, Any]]:
    """Runs on this rank; rank 1 alone gets the signal within the call `number` (from 1) of the function
    `target`. The exit code and the status file.
    """
    os.environ[STATUS_FILE] = str(status)
    whole: Callable[..., Any] = pkgutil.resolve_name(target)
    calls: list[int] = []

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            ask_to_stop(1)
        return whole(*args, **kwargs)

    try:
        with patch(target, disturbed):
            code = run_program(lambda: train.run_training(config))
    finally:
        del os.environ[STATUS_FILE]
    return code, json.loads(status.read_text())


def undisturbed(root: Path, ranks: Ranks) -> Path:
    """The run folder of six steps on two ranks; made once."""
    whole = root / "whole"
    if not whole.exists():
        ranks(2, run, six_steps(root, whole))
    return whole


def same_lines(whole: Path, parts: Path) -> bool:
    """Every step and every evaluation once, to the last bit."""
    mine, theirs = (
        [line for line in without_clock(read_metrics(folder)) if "reference/rows_computed" not in line]
        for folder in (whole, parts)
    )
    return mine == theirs


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_all_ranks_stop_after_the_step_of_the_signal(root: Path, ranks: Ranks, tmp_path: Path, step: int) -> None:
    """Also after a step that is followed by an evaluation (3) and after the last (6), whose evaluation is then made by
    the part that goes on."""
    whole = undisturbed(root, ranks)
    config = six_steps(root, tmp_path / "run")
    answers = ranks(2, preempted, config, "dpo.train.loop.train_step", step, tmp_path / "status.json")
    assert answers == [(0, {"state": "preempted", "step": step, "saved": True})] * 2
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, step + 1))
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.name == f"step-{step:06d}"
    assert not (tmp_path / "run" / "final").exists()
    ranks(2, run, config)
    assert same_lines(whole, tmp_path / "run")
    assert same_weights(whole / "final", tmp_path / "run" / "final")


def test_twice(root: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Stopped, gone on, stopped again, gone on."""
    whole = undisturbed(root, ranks)
    config = six_steps(root, tmp_path / "run")
    for step in (2, 4):
        number = step if step == 2 else 2  # of the second part's own steps
        answers = ranks(2, preempted, config, "dpo.train.loop.train_step", number, tmp_path / "status.json")
        assert answers[0] == (0, {"state": "preempted", "step": step, "saved": True})
    ranks(2, run, config)
    assert same_lines(whole, tmp_path / "run")


@pytest.mark.parametrize(("number", "step"), [(1, 0), (2, 3), (3, 6)])
def test_a_signal_within_an_evaluation(root: Path, ranks: Ranks, tmp_path: Path, number: int, step: int) -> None:
    """Evaluations come after 0, 3 and 6 steps, checkpoints after 2, 4 and 6: step 3 is saved for the signal's sake, and
    the evaluation is made by the part that goes on."""
    whole = undisturbed(root, ranks)
    config = six_steps(root, tmp_path / "run")
    answers = ranks(2, preempted, config, "dpo.step.evaluation.evaluation_plans", number, tmp_path / "status.json")
    assert answers == [(0, {"state": "preempted", "step": step, "saved": step > 0})] * 2
    assert [line["step"] for line in eval_lines(tmp_path / "run")] == [0, 3, 6][: number - 1]
    ranks(2, run, config)
    assert same_lines(whole, tmp_path / "run")
    assert same_weights(whole / "final", tmp_path / "run" / "final")


def test_a_signal_within_the_reference_pass(root: Path, ranks: Ranks, tmp_path: Path) -> None:
    """What was computed is kept, and the run has not begun: a budget of 1 token makes every completion a chunk."""
    changes = {"reference__cache_dir": str(tmp_path / "cache"), "batch__tokens_per_micro_batch": 1}
    config = six_steps(root, tmp_path / "run", **changes)
    answers = ranks(2, preempted, config, "dpo.ref_logps.fill._run", 3, tmp_path / "status.json")
    assert answers == [(0, {"state": "preempted", "step": 0, "saved": False})] * 2
    assert has_log_alone(tmp_path / "run") and logged(tmp_path / "run")[-1] == str(Preempted(0, is_saved=False))
    ranks(2, run, config)
    computed, reused = reference_line(tmp_path / "run")
    assert reused > 0 and computed > 0 and computed + reused == 20


def test_a_run_that_ends_by_itself_says_so(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status.json"))
    config = six_steps(root, tmp_path / "run", train__steps=1)
    assert run_program(lambda: train.run_training(config)) == 0
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "done"}
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN  # one that comes late must not kill what is done


@pytest.mark.parametrize("asked", [False, True])
def test_the_launcher_knows_the_end_before_trackers_are_waited_for(root: Path, tmp_path: Path, asked: bool) -> None:
    """A launcher that kills a run while a tracker does not answer is not to say that the run had not saved."""
    config = six_steps(root, tmp_path / "run", train__steps=1)
    known: list[dict[str, Any]] = []
    close = MetricsWriter.close

    def look_and_close(writer: MetricsWriter, *ending: Any) -> None:
        known.append(json.loads((tmp_path / "status.json").read_text()))
        close(writer, *ending)

    def take_step(*args: Any) -> dict[str, float]:
        if asked:
            os.kill(os.getpid(), signal.SIGUSR2)
        return train_step(*args)

    with (
        patch.dict(os.environ, {STATUS_FILE: str(tmp_path / "status.json")}),
        patch.object(MetricsWriter, "close", look_and_close),
        patch.object(loop, "train_step", take_step),
    ):
        assert run_program(lambda: train.run_training(config)) == 0
    assert known == [{"state": "preempted", "step": 1, "saved": True} if asked else {"state": "done"}]
    assert newest_checkpoint(tmp_path / "run") is not None and (tmp_path / "run" / "final").exists() is not asked


def test_a_launcher_that_cannot_be_told_costs_no_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, status = six_steps(root, tmp_path / "run", train__steps=1), tmp_path / "status.json"
    monkeypatch.setenv(STATUS_FILE, str(status))

    def fail(told: Mapping[str, Any]) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device", str(status))

    monkeypatch.setattr("dpo.command.status.write_status", fail)  # not that of the loop, which tells the beginning
    assert run_program(lambda: train.run_training(config)) == 0
    assert "the launcher cannot be told that the run is done: the disk is full" in capsys.readouterr().err
    assert (tmp_path / "run" / "final").exists() and json.loads(status.read_text())["state"] == "training"


def test_a_start_that_could_not_tell_that_it_saves_does_not_begin(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that does not know that training has begun kills the run at the first signal."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "file" / "status.json"))
    with pytest.raises(OSError, match="file"):
        run(six_steps(root, tmp_path / "run", train__steps=1))
    assert not train_lines(tmp_path / "run")


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (Preempted(7, is_saved=True), "stopped after step 7; the same command resumes from here"),
        (Preempted(7, is_saved=False), "stopped before its first step; the same command resumes from step 7"),
        (Preempted(0, is_saved=False), "stopped before the first step; the same command starts again; computed rows"),
    ],
)
def test_what_a_stopped_run_says(stop: Preempted, line: str) -> None:
    assert str(stop).startswith(line)


def test_an_evaluation_is_made_once(root: Path, tmp_path: Path) -> None:
    """A resume at a step whose evaluation stands in metrics.jsonl makes none."""
    config = six_steps(root, tmp_path / "run")
    with patch.object(outputs, "export", side_effect=OSError("the disk is gone")), pytest.raises(OSError):
        run(config)
    evaluations: list[int] = []
    whole = loop.evaluate

    def counted(*args: Any) -> Evaluation:
        evaluations.append(1)
        return whole(*args)

    with patch.object(loop, "evaluate", counted):
        run(config)
    assert not evaluations
