"""The callable that submitit runs on SLURM, once on each node; the first node has submitit requeue the job.

submitit's handler of SIGUSR2 requeues, and counts the time-outs: for one of them it takes every start of a job whose
limit is 10 minutes or less, and otherwise what ends in the last fifth of the limit, or in its last 10 minutes where
those are more; crashes too.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import submitit

from dpo.base.console import warn
from launch import squeue, supervise, torchrun
from launch.decision import STOPPED
from launch.node import NodeJob
from launch.reports import Attempt, Outcome

_REQUEUE_SECONDS = 120.0
"""How long a requeueing that fails is tried again: SLURM's controller may be starting anew."""
_AGAIN_SECONDS = 5.0


@dataclass(frozen=True)
class SlurmJob:
    """What submitit pickles."""

    job: NodeJob

    def __call__(self) -> None:
        """Runs this node; raises SystemExit with the job's exit code unless the job is done."""
        requeue: Any = signal.getsignal(signal.SIGUSR2)
        job = submitit.JobEnvironment()
        hosts = tuple(job.hostnames)
        place = torchrun.Place(job.node, hosts, torchrun.master_port(job.raw_job_id) if len(hosts) > 1 else 0)
        attempt = Attempt(self.job.folder, int(os.environ.get("SLURM_RESTART_COUNT", "0")))  # the same on all nodes
        with supervise.signals(lambda: squeue.goes_on(job.raw_job_id)) as noted:
            report = self.job.run(place, attempt, noted)
            if place.node != 0:  # the first node decides
                raise SystemExit(1 if report.exit_code else 0)
            outcome = self.job.conclude(place, attempt, noted, report)
            if outcome.state in ("preempted", "crashed"):
                outcome = self.job.tell(why_not_requeued(requeue, noted))
        if outcome.state != "done":
            raise SystemExit(outcome.exit_code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit runs after requeueing: the same again."""
        return submitit.helpers.DelayedSubmission(self)


def why_not_requeued(requeue: Callable[[int, None], None], noted: supervise.Signals) -> Outcome:
    """Requeues the job, which raises SystemExit, or gives what becomes of it where that is not possible.

    requeue: submitit's handler of SIGUSR2.
    """
    deadline = time.monotonic() + _REQUEUE_SECONDS
    while True:
        noted.look()
        if noted.ended:  # cancelled while it was saving: a requeued one would run in spite of that
            return STOPPED
        try:
            requeue(signal.SIGUSR2, None)
        except submitit.core.utils.UncompletedJobError:
            return Outcome("failed", "its time was up too often (--max-timeouts); the same command goes on", 1)
        except (OSError, subprocess.SubprocessError) as failure:
            if time.monotonic() > deadline:
                return Outcome("failed", f"the job cannot be requeued ({failure}); the same command goes on", 1)
            warn(f"the job cannot be requeued yet: {failure}")
        time.sleep(_AGAIN_SECONDS)
