"""What SLURM says of its jobs, by squeue: sacct, which submitit asks, needs accounting that not every cluster has."""

import re
import subprocess

from dpo.base.console import warn

UNKNOWN = "UNKNOWN"
ENDED = re.compile("BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|TIMEOUT")
"""States that a job does not leave."""

_PATIENCE_SECONDS = 20.0


def state(job: str) -> str | None:
    """The state of a job as SLURM names it, RUNNING for one; null: SLURM does not know it (any more).

    UNKNOWN where squeue does not answer, while its controller restarts for one.
    """
    return _ask(job, "%T")


def is_active(job: str) -> bool:
    """Whether a job waits or runs, or may do so where squeue does not answer."""
    found = state(job)
    return found is not None and not ENDED.fullmatch(found)


def goes_on(job: str) -> bool | None:
    """Whether a job that SLURM has sent SIGTERM is meant to go on; null: squeue does not answer.

    RUNNING, it is preempted and has time to save. COMPLETING, it is cancelled or requeued, or has lost a node; or its
    time is over, when it can still be requeued.
    """
    answer = _ask(job, "%T/%r")
    found, _, reason = str(answer).partition("/")
    return None if answer == UNKNOWN else found == "RUNNING" or reason == "TimeLimit"


def _ask(job: str, form: str) -> str | None:
    command = ["squeue", "--noheader", "--states=all", "--array", f"--jobs={job}", f"--format={form}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as failure:
        warn(f"squeue: {failure}")
        return UNKNOWN
    if answer.returncode and "Invalid job id" not in answer.stderr:
        warn(f"squeue: {answer.stderr.strip()}")
        return UNKNOWN
    return next(iter(answer.stdout.split()), None)
