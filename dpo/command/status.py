"""Reports to the launcher how far a program is, and how it ended: torchrun's exit code is 0 for a run that is done and
for one that was preempted.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo.base.errors import Preempted
from dpo.base.files import write_atomically
from dpo.command.exits import line_of
from dpo.terminal.console import warn

STATUS_FILE = "DPO_STATUS_FILE"
"""The environment variable with which a launcher names the file for `write_status`."""


GPUS_ASKED = "DPO_GPUS_ASKED"
"""The environment variable with which a launcher tells the ranks how many GPUs were asked for, where SLURM does not."""


def read_status(path: Path) -> dict[str, Any]:
    """Returns the state that rank 0 wrote; empty before it has written one."""
    try:
        status: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return status


def write_status(status: Mapping[str, Any]) -> bool:
    """Writes the state of the run to the file that the launcher named, and returns whether there is one. Rank 0 alone
    calls this.

    {"state": "training", "step": s}                    the steps begin with step s; from now on the run saves when it
                                                        is asked to stop
    {"state": "preempted", "step": s, "saved": true}    the run stops early, after s steps, which are saved; false:
                                                        before its first step, and nothing was saved
    {"state": "done"}                                   nothing is left to compute or to save

    After the last two the ranks still wait for trackers, and end. Raises OSError where the file cannot be written.
    """
    path = os.environ.get(STATUS_FILE)
    if path:
        write_atomically(Path(path), json.dumps(status).encode())
    return bool(path)


def tell_end(stop: Preempted | None) -> bool:
    """Writes, on rank 0, that the run is preempted, or done, unless that is written already; warns where it cannot be.

    Returns whether a launcher knows it, which then tells the user.
    """
    status = {"state": "preempted", "step": stop.step, "saved": stop.is_saved} if stop else {"state": "done"}
    path = os.environ.get(STATUS_FILE)
    try:
        return bool(path) and (read_status(Path(str(path))) == status or write_status(status))
    except OSError as failure:
        warn(f"the launcher cannot be told that the run is {status['state']}: {line_of(failure)}")
        return False


@contextmanager
def telling_end(is_main: bool) -> Iterator[None]:
    """Tells, on rank 0, how a with-block ends (`tell_end`); nothing where it fails."""
    try:
        yield
    except Preempted as stop:
        if is_main:
            tell_end(stop)
        raise
    if is_main:
        tell_end(None)
