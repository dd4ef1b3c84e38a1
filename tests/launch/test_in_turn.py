"""A sweep on one machine: the runs of one job, one after the other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch.in_turn import InTurn
from launch.reports import Outcome, read_outcome, write_outcome


@dataclass
class Run:
    """A run that ends with these outcomes, one each time that it is started."""

    folder: Path
    outcomes: list[Outcome]
    starts: int = field(default=0)

    def __call__(self) -> None:
        outcome = self.outcomes[self.starts]
        self.starts += 1
        write_outcome(self.folder, outcome)
        if outcome.state != "done":
            raise SystemExit(7)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Run]:
    """Makes a run from its outcomes."""
    return lambda name, *states: Run(tmp_path / name, [Outcome(state, f"{name} says so", 1) for state in states])


def code_of(job: InTurn) -> int:
    """The exit code of a job that does not end well."""
    with pytest.raises(SystemExit) as end:
        job()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_run_that_fails_does_not_stop_the_others(make: Callable[..., Any], tmp_path: Path) -> None:
    reference, runs = make("reference", "done"), (make("a", "done"), make("b", "failed"), make("c", "done"))
    assert code_of(InTurn((reference,), runs, tmp_path / "sweep")) == 1
    assert [run.starts for run in (reference, *runs)] == [1, 1, 1, 1]
    assert read_outcome(tmp_path / "sweep") == Outcome("failed", "1 of 3 runs failed, the first: b says so", 1)


def test_without_the_reference_no_run_begins(make: Callable[..., Any], tmp_path: Path) -> None:
    reference, run = make("reference", "failed"), make("a", "done")
    code_of(InTurn((reference,), (run,), tmp_path / "sweep"))
    assert run.starts == 0
    outcome = read_outcome(tmp_path / "sweep")
    assert outcome is not None and "reference says so" in outcome.message


def test_a_job_that_starts_again_goes_on_where_it_was(make: Callable[..., Any], tmp_path: Path) -> None:
    """The exit code of a run that was told to stop is submitit's, which asks for the restart."""
    a, b, c = make("a", "done"), make("b", "preempted", "done"), make("c", "done")
    job = InTurn((), (a, b, c), tmp_path / "sweep")
    assert code_of(job) == 7
    assert [run.starts for run in (a, b, c)] == [1, 1, 0]
    job()
    assert [run.starts for run in (a, b, c)] == [1, 2, 1]
    assert read_outcome(tmp_path / "sweep") == Outcome("done")
