"""The callable that submitit runs on SLURM, once per node. The first node calls submitit to requeue the job.

submitit's handler of SIGUSR2 requeues the job and counts its time-outs. An end of the job, by a crash too, counts as a
time-out if it falls in the last fifth of the time limit or in its last 10 minutes, whichever is longer. For a limit of
10 minutes or less every end counts.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import submitit

from dpo.terminal.console import warn
from launch import squeue, stops, torchrun
from launch.decision import stopped
from launch.node import NodeJob
from launch.reports import Attempt, Outcome

_REQUEUE_SECONDS = 120.0
"""How long a failing requeue is retried: SLURM's controller may be restarting."""
_AGAIN_SECONDS = 5.0
_UNKNOWN = "squeue does not tell whether it was cancelled"


@dataclass(frozen=True)
class SlurmJob:
    """The callable that submitit pickles, and runs on each node."""

    job: NodeJob

    def __call__(self) -> None:
        """Runs torchrun on this node, and on the first node decides what follows. Raises SystemExit with the exit code
        of the job unless it is done.
        """
        requeue: Any = signal.getsignal(signal.SIGUSR2)
        job = submitit.JobEnvironment()
        hosts = tuple(job.hostnames)
        place = torchrun.Place(job.node, hosts, torchrun.master_port(job.raw_job_id) if len(hosts) > 1 else 0)
        attempt = Attempt(self.job.folder, int(os.environ.get("SLURM_RESTART_COUNT", "0")))  # the same on all nodes
        with stops.signals(lambda: squeue.goes_on(job.raw_job_id), lambda: 0.75 * squeue.kill_wait()) as noted:
            report = self.job.run(place, attempt, noted)
            if place.node != 0:  # the first node decides
                raise SystemExit(1 if report.exit_code else 0)
            outcome = self.job.conclude(place, attempt, noted, report)
            if outcome.state in ("preempted", "crashed"):
                outcome = self.job.tell(why_not_requeued(requeue, noted, outcome.message))
        if outcome.state != "done":
            raise SystemExit(outcome.exit_code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Returns the callable that submitit runs after requeueing: this one again."""
        return submitit.helpers.DelayedSubmission(self)


def why_not_requeued(requeue: Callable[[int, None], None], noted: stops.Signals, kept: str) -> Outcome:
    """Requeues the job, which raises SystemExit, or returns the outcome of a job that cannot be requeued.

    Args:
        requeue: submitit's handler of SIGUSR2.
        noted: the signals received so far; a job that was cancelled meanwhile is not requeued.
        kept: what the run has saved.
    """
    deadline = time.monotonic() + _REQUEUE_SECONDS
    why = ""
    while time.monotonic() < deadline:
        noted.look()
        if noted.ended:  # cancelled while saving: if requeued, the job would run again
            return stopped(noted.ended_by, kept)
        try:
            why = _UNKNOWN if noted.in_question else str(_failure_of(requeue))
        except submitit.core.utils.UncompletedJobError:
            return Outcome("failed", "its time was up too often (--max-timeouts); the same command resumes the run", 1)
        warn(f"the job cannot be requeued yet: {why}")
        time.sleep(_AGAIN_SECONDS)
    return Outcome("failed", f"the job cannot be requeued ({why}); the same command resumes the run", 1)


def _failure_of(requeue: Callable[[int, None], None]) -> Exception:
    """Requeues the job, which raises SystemExit; returns why that failed, as while SLURM's controller restarts."""
    try:
        requeue(signal.SIGUSR2, None)
    except (OSError, subprocess.SubprocessError) as failure:
        return failure
    raise AssertionError("submitit's handler ends the process")
