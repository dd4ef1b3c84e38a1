"""Runs on one machine, one after the other, each until it ends; torchrun is one that ends as a test tells it to."""

import json
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo.command.status import STATUS_FILE
from launch import here, supervise
from launch.here import RunsHere, run_here
from launch.node import NodeJob
from launch.reports import Outcome, history, read_outcome
from launch.supervise import Ended
from launch.torchrun import Program


class FakeTorchrun:
    """Each run ends as planned: the last word of its command line is its name."""

    def __init__(self, folder: Path, plan: dict[str, list[str]]):
        self.folder, self.plan = folder, plan
        self.checkpoints: dict[int, str] = {}
        """By how many starts came before it: what a start saves."""
        self.signals: dict[int, Sequence[int]] = {}
        """By how many starts came before it: signals that come once a start has told its end."""
        self.runs: list[str] = []

    def __call__(self, words: Sequence[str], env: dict[str, str], *rest: Any) -> Ended:
        ended = self._end(words[-1], env)
        for number in self.signals.pop(len(self.runs) - 1, ()):
            signal.raise_signal(number)
        return ended

    def _end(self, name: str, env: dict[str, str]) -> Ended:
        if len(self.runs) in self.checkpoints:
            marker = self.folder / name / "checkpoints" / self.checkpoints[len(self.runs)] / "COMPLETE"
            marker.parent.mkdir(parents=True)
            marker.touch()
        self.runs.append(name)
        what = self.plan[name].pop(0)
        if what in ("done", "preempted"):
            Path(env[STATUS_FILE]).write_text(json.dumps({"state": what, "step": 4, "saved": True}))
            return Ended(0, "")
        if what == "crashed":
            return Ended(1, "")
        Path(env["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": what}))
        return Ended(1, "")


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """SIGUSR2 as it was."""
    before = signal.getsignal(signal.SIGUSR2)
    yield
    signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunsHere, FakeTorchrun]]:
    """Makes work of a plan: a run for each name, `reference` before all."""

    def make(**plan: list[str]) -> tuple[RunsHere, FakeTorchrun]:
        torchrun = FakeTorchrun(tmp_path, plan)
        monkeypatch.setattr(supervise, "run", torchrun)
        jobs = {name: NodeJob(Program("dpo.train", (name,), 1), tmp_path / name / "jobs/x", 120, 2) for name in plan}
        references = tuple(job for name, job in jobs.items() if name == "reference")
        return RunsHere(
            references, tuple(job for job in jobs.values() if job not in references), tmp_path / "sweep"
        ), torchrun

    return make


def code_of(work: RunsHere) -> int:
    """The exit code of work that does not end well."""
    with pytest.raises(SystemExit) as end:
        run_here(work)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_run_that_fails_does_not_stop_the_others(work: Callable[..., Any], tmp_path: Path) -> None:
    all_runs, torchrun = work(reference=["done"], a=["done"], b=["ValueError: boom"], c=["done"])
    assert code_of(all_runs) == 1
    assert torchrun.runs == ["reference", "a", "b", "c"]
    outcome = read_outcome(tmp_path / "sweep")
    assert outcome is not None and outcome.state == "failed"
    assert outcome.message.startswith("1 of 3 runs failed, the first: ") and "ValueError: boom" in outcome.message


def test_without_the_reference_no_run_begins(work: Callable[..., Any], tmp_path: Path) -> None:
    all_runs, torchrun = work(reference=["ValueError: no reference"], a=["done"], b=["done"])
    code_of(all_runs)
    assert torchrun.runs == ["reference"]
    outcome = read_outcome(tmp_path / "sweep")
    assert outcome is not None and "no reference" in outcome.message


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda value: value
)
@pytest.mark.parametrize("at", [0, 1], ids=["reference", "a"])
def test_a_signal_near_the_end_of_a_run_ends_the_sweep(
    work: Callable[..., Any], tmp_path: Path, number: int, code: int, at: int
) -> None:
    """The run is done, and waits for a tracker; the next one does not begin."""
    all_runs, torchrun = work(reference=["done"], a=["done"], b=["done"])
    torchrun.signals = {at: [number]}
    assert code_of(all_runs) == code
    assert torchrun.runs == ["reference", "a"][: at + 1]
    assert read_outcome(tmp_path / torchrun.runs[-1] / "jobs/x") == Outcome("done")


def test_a_signal_near_the_end_of_a_single_run_is_its_exit_code(work: Callable[..., Any]) -> None:
    """As that of `dpo train`."""
    all_runs, torchrun = work(a=["done"])
    torchrun.signals = {0: [signal.SIGINT]}
    assert code_of(all_runs) == 130


def test_a_signal_once_the_outcome_is_told_ends_the_work(
    work: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that saved by SIGUSR2 does not start again after it."""
    all_runs, torchrun = work(a=["preempted", "done"])
    conclude = NodeJob.conclude

    def then_ctrl_c(*args: Any) -> Outcome:
        outcome = conclude(*args)
        signal.raise_signal(signal.SIGINT)
        return outcome

    monkeypatch.setattr(NodeJob, "conclude", then_ctrl_c)
    assert code_of(all_runs) == 130 and torchrun.runs == ["a"]


def test_there_is_no_limit_to_preemptions(work: Callable[..., Any], tmp_path: Path) -> None:
    """And lost ranks have the same one as on a cluster."""
    all_runs, torchrun = work(a=[*["preempted"] * 20, "done"], b=["crashed", "crashed", "crashed"])
    assert code_of(all_runs) == 1
    assert torchrun.runs.count("a") == 21 and history(tmp_path / "a/jobs/x") == ["preempted"] * 20 + ["done"]
    assert history(tmp_path / "b/jobs/x") == ["crashed", "crashed", "failed"]


def test_crashes_count_from_the_newest_checkpoint(work: Callable[..., Any], tmp_path: Path) -> None:
    """Two restarts are allowed; what loses a rank now and then in weeks makes progress in between."""
    all_runs, torchrun = work(a=["crashed"] * 7, b=["done"])
    torchrun.checkpoints = {2: "step-000010", 4: "step-000020"}
    code_of(all_runs)
    assert history(tmp_path / "a/jobs/x") == ["crashed"] * 6 + ["failed"]


def test_a_single_run_that_is_done(
    work: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line says what is done."""
    run_here(work(a=["done"])[0])
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"dpo.train in {tmp_path / 'a'}: done"
    assert read_outcome(tmp_path / "a/jobs/x") == Outcome("done") and not (tmp_path / "sweep").exists()


def test_the_process_in_the_background_removes_its_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stay in the run folder for ever; the file has served when it is read."""
    file = tmp_path / "log.pkl"
    file.write_bytes(pickle.dumps(RunsHere((), (), tmp_path)))
    monkeypatch.setattr(sys, "argv", ["launch.here", str(file)])
    here.main()
    assert not file.exists()
