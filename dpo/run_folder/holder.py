"""Who holds a run folder, and whether it is over, so that another start may take the folder; without torch."""

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo.base.processes import Process, find_process, own_pid_namespace
from dpo.machine.job import launch_of, requeued_job

SILENT_SECONDS = 600.0
"""Seconds after which a holder that has not touched its lock counts as gone, wherever it is."""
EARLIER_SECONDS = 50.0
"""The same, of one that may be this run before torchrun started it again on another host, where the start that asks has
itself watched the lock for so long: a run that lives touches it twice in this time.
"""


@dataclass(frozen=True)
class Holder:
    """A process that takes a run folder."""

    host: str
    boot: str
    """The id of the host's present boot: a process id means nothing after the next one."""
    pid_namespace: str
    pid: int
    started: int
    """Clock ticks from the boot to the start of the process: a later process with its id has another number."""
    job: str | None
    """The id of the job of SLURM; None outside of one."""
    restarts: int
    """How often SLURM had requeued the job."""
    since: str
    token: str
    """Random: files with the same token are of the same holder."""
    launch: str | None = None
    """The id that was given to torchrun, `--rdzv-id`; None: none was given."""

    def __str__(self) -> str:
        """Returns the holder in words."""
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    @property
    def bounds(self) -> str:
        """Returns after how long a silence another start may take the folder from this holder that runs, in words."""
        earlier = f", or for {EARLIER_SECONDS:.0f} s where the other start has the same --rdzv-id"
        return f"{SILENT_SECONDS / 60:.0f} minutes{earlier if self.launch is not None else ''}"

    def to_json(self) -> bytes:
        """Returns the content of a lock."""
        return json.dumps(asdict(self)).encode() + b"\n"


def holder_in(content: bytes) -> Holder | None:
    """Returns the holder that a lock names; None where the content is damaged."""
    try:
        holder = Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None
    numbers = (holder.pid, holder.started, holder.restarts)
    is_whole = all(isinstance(number, int) for number in numbers)
    return holder if is_whole and isinstance(holder.token, str) else None


def this_process(environment: Mapping[str, str]) -> Holder:
    """Returns this process as a new holder. The environment tells its job and its launch."""
    job, restarts = requeued_job(environment)
    own = _find(os.getpid())
    return Holder(
        host=socket.gethostname(),
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid_namespace=own_pid_namespace(),
        pid=os.getpid(),
        started=own.started if own else 0,
        job=job,
        restarts=restarts,
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        token=uuid.uuid4().hex,
        launch=launch_of(environment),
    )


def why_over(holder: Holder | None, me: Holder, age: float, watched: float = 0.0) -> str | None:
    """Returns why `me` may take a folder from its holder; None where it may not.

    Args:
        holder: of the lock; None where its file is damaged and does not tell.
        me: the process that asks.
        age: seconds since the holder last touched the lock.
        watched: seconds in which `me` has read the lock again and again, and the holder has not touched it.
    """
    if holder is not None and _same_host(holder, me) and not is_running(holder.pid, holder.started):
        return "that process has ended"
    if holder is not None and holder.job is not None and holder.job == me.job and holder.restarts < me.restarts:
        return f"that was this job before SLURM restarted it ({holder.restarts} restarts then, {me.restarts} now)"
    if may_be_earlier(holder, me) and watched >= EARLIER_SECONDS:
        return f"that was this run before torchrun started it again, and nothing was heard of it for {age:.0f} s"
    return f"nothing was heard of it for {age / 60:.0f} minutes" if age > SILENT_SECONDS else None


def may_be_earlier(holder: Holder | None, me: Holder) -> bool:
    """Returns whether the holder may be this run before torchrun started it again, with rank 0 on another host. It may
    also be another run to which torchrun was given the same id, as an example of it is copied. On one host torchrun has
    ended the processes before it starts them again.
    """
    if holder is None or holder.launch is None:
        return False
    return holder.launch == me.launch and not _same_host(holder, me)


def _same_host(holder: Holder, me: Holder) -> bool:
    """Returns whether the process id of one means the same process to the other."""
    mine, theirs = ((one.host, one.boot, one.pid_namespace) for one in (me, holder))
    return mine == theirs


def is_running(pid: int, started: int) -> bool:
    """Returns whether the process with this id and start runs on this host. A zombie has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's, whose processes /proc may hide
        pass
    found = _find(pid)
    return found is None or (found.state not in "ZX" and found.started == started)


def _find(pid: int) -> Process | None:
    """Returns the process with an id; None also where /proc cannot be read."""
    try:
        return find_process(pid)
    except OSError:
        return None
