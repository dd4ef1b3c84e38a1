"""What SLURM says of its jobs, by squeue: sacct, which submitit asks, needs accounting that not every cluster has."""

import re
import subprocess

from dpo.progress import warn

UNKNOWN = "UNKNOWN"
ENDED = re.compile("BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|TIMEOUT")
"""States that a job does not leave."""


def state(job: str) -> str | None:
    """The state of a job as SLURM names it, RUNNING for one; null: SLURM does not know it (any more).

    UNKNOWN where squeue does not answer, while its controller restarts for one.
    """
    command = ["squeue", "--noheader", "--states=all", "--array", f"--jobs={job}", "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as failure:
        warn(f"squeue: {failure}")
        return UNKNOWN
    if answer.returncode:
        return None if "Invalid job id" in answer.stderr else UNKNOWN
    return answer.stdout.split()[0] if answer.stdout.split() else None


def is_active(job: str) -> bool:
    """Whether a job waits or runs, as far as SLURM tells."""
    found = state(job)
    return found not in (None, UNKNOWN) and not ENDED.fullmatch(str(found))
