"""Follows jobs until they end, and reports how they ended.

The log of a single job is printed as it grows; of several jobs only changes of state are printed. Jobs report their own
state in files; squeue answers for jobs that cannot. submitit's `results()` is not used: it asks sacct, and on clusters
without accounting waits forever.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import RunError, UserError
from dpo.command.exits import EXIT_CODES
from dpo.terminal.console import harmless, say
from launch import squeue
from launch.checks import is_active
from launch.reports import FINAL, Outcome, Submission, read_outcome

_LOOK_SECONDS = 0.5
_QUEUE_SECONDS = 10.0
"""Time between calls of squeue, which load SLURM's controller for all users."""
_LAST_REPORT_SECONDS = 3.0
"""Time that the report of how a job ended has to become readable after the job has left the queue."""


@dataclass(frozen=True)
class Followed:
    """A job to follow."""

    name: str
    submission: Submission
    reports: Path
    """The folder of its reports."""


def follow(jobs: Sequence[Followed]) -> None:
    """Waits until all jobs have ended.

    Raises:
        UserError: if the first job that is not done ended because of wrong input.
        RunError: if it ended for another reason.
        KeyboardInterrupt: after Ctrl-C; the jobs keep running, and the command that cancels them is printed.
    """
    try:
        outcomes = _watch(jobs)
    except KeyboardInterrupt:
        names = list(dict.fromkeys(job.submission.whole for job in jobs))
        cancel = cancel_command(jobs[0].submission.cluster, names)
        print(f"\nthe job keeps running; to cancel it: {cancel}", file=sys.stderr)
        raise
    failed = [(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if outcome.state != "done"]
    if failed:
        job, outcome = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        place, what = f"job {job.submission.job}", f"{outcome.message or outcome.state}{more}"
        raise UserError(place, what) if outcome.exit_code == EXIT_CODES[UserError] else RunError(f"{place}: {what}")


def cancel_command(cluster: str, jobs: Sequence[str]) -> str:
    """Returns the shell command that cancels jobs."""
    return f"scancel {' '.join(jobs)}" if cluster == "slurm" else f"kill -- -{jobs[0]}"


def _watch(jobs: Sequence[Followed]) -> list[Outcome]:
    log = _Log(Path(jobs[0].submission.log)) if len(jobs) == 1 else None
    watches = [_Watch(job) for job in jobs]
    while True:
        outcomes = [watch.look() for watch in watches]
        if log:
            log.show()  # after `look`: if that found the end of the job, the log is complete
        for watch in watches:
            watch.tell()
        ends = [outcome for outcome in outcomes if outcome is not None]
        if len(ends) == len(jobs):
            return ends
        time.sleep(_LOOK_SECONDS)


class _Log:
    """Prints a file that grows, from its beginning."""

    def __init__(self, path: Path):
        self.path = path
        self.shown = 0

    def show(self) -> None:
        """Prints the bytes that were appended since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.shown)
            new = file.read()
        self.shown += len(new)
        sys.stderr.write(harmless(new.decode(errors="replace")))
        sys.stderr.flush()


class _Watch:
    """Asks for the state of one job, and remembers it."""

    def __init__(self, job: Followed):
        self.job = job
        self.state = ""
        self.printed = ""
        self.next_question = 0.0
        self.misses = 0
        """Number of successive answers without the job in the queue. Its report may arrive later."""

    def look(self) -> Outcome | None:
        """Returns how the job ended, or None if it has not ended."""
        outcome = read_outcome(self.job.reports)
        if outcome is not None and outcome.state in FINAL:
            self.state = outcome.state
            return outcome
        if time.monotonic() < self.next_question:
            return None
        state = self._ask()
        self.state = state.lower() if state else "not in the queue"
        is_over = state is None or bool(squeue.ENDED.fullmatch(state))
        self.next_question = time.monotonic() + (_LAST_REPORT_SECONDS if is_over else _QUEUE_SECONDS)
        self.misses = self.misses + 1 if is_over else 0
        return Outcome("failed", _why(state, outcome), 1) if self.misses > 1 else None

    def _ask(self) -> str | None:
        if self.job.submission.cluster == "slurm":
            return squeue.state(self.job.submission.job)
        return "RUNNING" if is_active(self.job.submission) else None

    def tell(self) -> None:
        """Prints the state of the job if it has changed since the last call."""
        if self.state != self.printed:
            say(f"{self.job.name} (job {self.job.submission.job}): {self.state}")
            self.printed = self.state


def _why(state: str | None, outcome: Outcome | None) -> str:
    """Returns how a job ended that did not report it: its state in the queue, and its last report."""
    before = f"; before that: {outcome.state}, {outcome.message}" if outcome is not None and outcome.message else ""
    return f"ended as {state}{before}" if state else f"has ended without a report{before}"
