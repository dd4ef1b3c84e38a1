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


def has_launcher() -> bool:
    """Returns whether a launcher named a file for the status; it then says itself how the run ended."""
    return bool(os.environ.get(STATUS_FILE))


@contextmanager
def telling_end(is_main: bool) -> Iterator[None]:
    """Writes, on rank 0, the status of how a with-block ends: preempted or done; none where it fails."""
    try:
        yield
    except Preempted as stop:
        if is_main:
            write_status({"state": "preempted", "step": stop.step, "saved": stop.is_saved})
        raise
    if is_main:
        write_status({"state": "done"})


def write_status(status: Mapping[str, Any]) -> None:
    """Writes the state of the run to the file that the launcher named, if any; warns where it cannot be written. Rank 0
    alone calls this.

    {"state": "training", "step": s}                    the steps begin with step s; from now on the run saves when it
                                                        is asked to stop
    {"state": "preempted", "step": s, "saved": true}    the run has ended early, after s steps; false: before its first
                                                        step, and nothing was saved
    {"state": "done"}                                   the run has ended
    """
    if has_launcher():
        try:
            write_atomically(Path(os.environ[STATUS_FILE]), json.dumps(status).encode())
        except OSError as failure:
            warn(f"the launcher does not know that the run is {status['state']}: {failure}")
