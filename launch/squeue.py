"""Asks squeue for the state of jobs; submitit asks sacct, which needs accounting that not every cluster has. Asks
scontrol how much time a job has to end.
"""

import re
import subprocess
from contextlib import suppress

from dpo.terminal.console import warn

UNKNOWN = "UNKNOWN"
ENDED = re.compile("BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|TIMEOUT")
"""Final states of a job."""

_PATIENCE_SECONDS = 20.0
_KILL_WAIT_PATIENCE_SECONDS = 5.0
"""The ranks are saving meanwhile, and their deadline must be known in time."""
_KILL_WAIT_SECONDS = 30.0


def state(job: str) -> str | None:
    """Returns the state of a job as SLURM names it, such as RUNNING; None if SLURM does not know the job (any more);
    UNKNOWN if squeue does not answer, for example while SLURM's controller restarts.
    """
    return _ask(job, "%T")


def is_active(job: str) -> bool:
    """Returns whether a job waits or runs. True if squeue does not answer, since the job may be active."""
    job_state = state(job)
    return job_state is not None and not ENDED.fullmatch(job_state)


def goes_on(job: str) -> bool | None:
    """Returns whether a job to which SLURM has sent SIGTERM should save and start again; None if squeue does not
    answer.

    A RUNNING job is being preempted and has time to save. A COMPLETING job is cancelled or requeued or has lost a node,
    and must end; but if the reason is its time limit, it can still be requeued.
    """
    answer = _ask(job, "%T/%r")
    job_state, _, reason = str(answer).partition("/")
    return None if answer == UNKNOWN else job_state == "RUNNING" or reason == "TimeLimit"


def kill_wait() -> float:
    """Returns the seconds between SIGTERM and SIGKILL with which SLURM ends a job (KillWait); its default where
    scontrol does not tell.
    """
    command, told = ["scontrol", "show", "config"], ""
    with suppress(OSError, subprocess.TimeoutExpired):  # a container without it, or a slow controller
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=_KILL_WAIT_PATIENCE_SECONDS, check=False
        ).stdout
    found = re.search(r"^KillWait\s*=\s*(\d+)", told, re.MULTILINE)
    return float(found[1]) if found else _KILL_WAIT_SECONDS


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
