"""Reports to the launcher how far a program is, and how it ended: torchrun's exit code is 0 for a run that is done and
for one that was preempted.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.base.files import write_atomically

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
    {"state": "preempted", "step": s, "saved": true}    the run has ended early, after s steps; false: before its first
                                                        step, and nothing was saved
    {"state": "done"}                                   the run has ended
    """
    path = os.environ.get(STATUS_FILE)
    if path:
        write_atomically(Path(path), json.dumps(status).encode())
    return bool(path)
