"""Reports to the launcher how a program ended, since torchrun's exit code does not tell "done" from "preempted"."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.base.files import write_atomically

STATUS_FILE = "DPO_STATUS_FILE"
"""The environment variable with which a launcher names the file for `write_status`."""


def write_status(status: Mapping[str, Any]) -> None:
    """Writes {"state": "done" or "preempted", "step": s} to the file that the launcher named; does nothing without one.

    Rank 0 alone calls this, after a run that ended well. torchrun's exit code is 0 for both states.
    """
    path = os.environ.get(STATUS_FILE)
    if path:
        write_atomically(Path(path), json.dumps(status).encode())
