"""Shows what jobs do until they end, and how they ended.

A single job's log is shown as it grows. Of several only the changes are told. Never by sacct, which submitit's own
`results()` waits for in vain where there is no accounting: jobs report themselves, and squeue tells those that cannot.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.base.command import EXIT_CODES
from dpo.base.console import say
from dpo.base.errors import RunError, UserError
from launch import squeue
from launch.checks import is_active
from launch.reports import FINAL, Outcome, Submission, read_outcome

_LOOK_SECONDS = 0.5
_QUEUE_SECONDS = 10.0
"""Time between questions to SLURM's controller, which serves everybody."""
_LAST_WORDS_SECONDS = 3.0
"""A job that has left the queue has this long to say how it ended."""


@dataclass(frozen=True)
class Followed:
    """A job that is followed."""

    name: str
    submission: Submission
    reports: Path
    """The folder of its reports."""


def follow(jobs: Sequence[Followed]) -> None:
    """Waits until all jobs have ended. Raises RunError, or UserError where the input was wrong, if one is not done."""
    try:
        outcomes = _watch(jobs)
    except KeyboardInterrupt:
        names = list(dict.fromkeys(job.submission.whole for job in jobs))
        cancel = cancel_command(jobs[0].submission.cluster, names)
        print(f"\nthe job goes on; to cancel it: {cancel}", file=sys.stderr)
        raise
    failed = [(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if outcome.state != "done"]
    if failed:
        job, outcome = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        place, what = f"job {job.submission.job}", f"{outcome.message or outcome.state}{more}"
        raise UserError(place, what) if outcome.exit_code == EXIT_CODES[UserError] else RunError(f"{place}: {what}")


def cancel_command(cluster: str, jobs: Sequence[str]) -> str:
    """What a person types to end jobs."""
    return f"scancel {' '.join(jobs)}" if cluster == "slurm" else f"kill -- -{jobs[0]}"


def _watch(jobs: Sequence[Followed]) -> list[Outcome]:
    log = _Log(Path(jobs[0].submission.log)) if len(jobs) == 1 else None
    watches = [_Watch(job) for job in jobs]
    while True:
        outcomes = [watch.look() for watch in watches]
        if log:
            log.show()  # after the look: if that saw the end, the log is whole
        for watch in watches:
            watch.tell()
        ends = [outcome for outcome in outcomes if outcome is not None]
        if len(ends) == len(jobs):
            return ends
        time.sleep(_LOOK_SECONDS)


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
    """What is known of one job, asked now and then."""

    def __init__(self, job: Followed):
        self.job = job
        self.state = ""
        self.told = ""
        self.next_question = 0.0
        self.misses = 0
        """How often in a row the queue did not know the job: its last words may come after it has left."""

    def look(self) -> Outcome | None:
        """How the job ended; null: it has not."""
        outcome = read_outcome(self.job.reports)
        if outcome is not None and outcome.state in FINAL:
            self.state = outcome.state
            return outcome
        if time.monotonic() < self.next_question:
            return None
        state = self._ask()
        self.state = state.lower() if state else "not in the queue"
        is_over = state is None or bool(squeue.ENDED.fullmatch(state))
        self.next_question = time.monotonic() + (_LAST_WORDS_SECONDS if is_over else _QUEUE_SECONDS)
        self.misses = self.misses + 1 if is_over else 0
        return Outcome("failed", _why(state, outcome), 1) if self.misses > 1 else None

    def _ask(self) -> str | None:
        if self.job.submission.cluster == "slurm":
            return squeue.state(self.job.submission.job)
        return "RUNNING" if is_active(self.job.submission) else None

    def tell(self) -> None:
        """Says the state if it is another than the last time."""
        if self.state != self.told:
            say(f"{self.job.name} (job {self.job.submission.job}): {self.state}")
            self.told = self.state


def _why(state: str | None, outcome: Outcome | None) -> str:
    """The end of a job that did not tell it itself, from what the queue says and the last that it said."""
    said = f"; before that: {outcome.state}, {outcome.message}" if outcome is not None and outcome.message else ""
    return f"ended as {state}{said}" if state else f"has ended and did not say how{said}"
