"""How a program tells its launcher how it ended."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.base.files import write_atomically

STATUS_FILE = "DPO_STATUS_FILE"
"""The environment variable in which a launcher names the file that `write_status` fills."""


def write_status(status: Mapping[str, Any]) -> None:
    """Tells the launcher, if there is one, how a program ended well: {"state": "done" or "preempted", "step": s}.

    For rank 0 alone. torchrun's exit code does not say it: 0 is both.
    """
    path = os.environ.get(STATUS_FILE)
    if path:
        write_atomically(Path(path), json.dumps(status).encode())
