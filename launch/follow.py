"""Shows the log of a job's first node until the job ends, and how it ended."""

import sys
import time
from pathlib import Path

from dpo.errors import RunError, UserError
from dpo.progress import say
from launch import squeue
from launch.checks import is_active
from launch.reports import FINAL, Outcome, Submission, read_outcome

_LOG_SECONDS = 0.5
_QUEUE_SECONDS = 10.0
"""Time between questions to SLURM's controller, which serves everybody."""


def follow(submission: Submission, reports: Path) -> None:
    """Streams the log to the end. Raises RunError, or UserError where the input was wrong, if the job is not done."""
    try:
        outcome = _stream(submission, reports)
    except KeyboardInterrupt:
        print(f"\njob {submission.job} goes on; cancel: {cancel_command(submission)}", file=sys.stderr)
        raise
    if outcome.state != "done":
        kind = UserError if outcome.exit_code == 2 else RunError
        raise kind(f"job {submission.job}: {outcome.message or outcome.state}")


def cancel_command(submission: Submission) -> str:
    """What a person types to end the job."""
    return f"scancel {submission.job}" if submission.cluster == "slurm" else f"kill -- -{submission.job}"


def _stream(submission: Submission, reports: Path) -> Outcome:
    log = _Log(Path(submission.log))
    watch = _Watch(submission)
    while True:
        outcome = read_outcome(reports)  # before the log, which then holds all that led to it
        log.show()
        if outcome is not None and outcome.state in FINAL:
            return outcome
        end = watch.end()
        if end:
            log.show()
            return read_outcome_at_end(reports, end)
        time.sleep(_LOG_SECONDS)


def read_outcome_at_end(reports: Path, end: str) -> Outcome:
    """How a job that has left the queue ended: what it said last if that is final, else what the queue says."""
    outcome = read_outcome(reports)
    return outcome if outcome is not None and outcome.state in FINAL else Outcome("failed", end, 1)


class _Log:
    """A file that grows, from its beginning."""

    def __init__(self, path: Path):
        self.path = path
        self.shown = 0

    def show(self) -> None:
        """Prints what is new."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.shown)
            new = file.read()
        self.shown += len(new)
        sys.stderr.write(new.decode(errors="replace"))
        sys.stderr.flush()


class _Watch:
    """Asks now and then whether a job still exists, and tells when its state changes."""

    def __init__(self, submission: Submission):
        self.submission = submission
        self.state: str | None = ""
        self.next_look = 0.0
        self.misses = 0

    def end(self) -> str:
        """Why the job is at an end although it did not say so itself; empty while it is not.

        Twice in a row: the last words of a job may come after it has left the queue.
        """
        if time.monotonic() < self.next_look:
            return ""
        self.next_look = time.monotonic() + _QUEUE_SECONDS
        state = self._look()
        if state != self.state and state is not None:
            say(f"job {self.submission.job}: {state.lower()}")
        self.state = state
        is_over = state is None or bool(squeue.ENDED.fullmatch(state))
        self.misses = self.misses + 1 if is_over else 0
        return self._why(state) if self.misses > 1 else ""

    def _look(self) -> str | None:
        if self.submission.cluster == "slurm":
            return squeue.state(self.submission.job)
        return "RUNNING" if is_active(self.submission) else None

    @staticmethod
    def _why(state: str | None) -> str:
        return f"ended as {state}" if state else "has ended and did not say how; see its log"
