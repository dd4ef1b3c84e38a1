"""A rank for the launcher's tests, under a real torchrun but without torch: `-m tests.launch.worker WHAT FOLDER`.

What it does is the name of a function here.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from dpo.command.status import write_status

RANK = int(os.environ["RANK"])
LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [10.0.0.1]:5: Connection reset by peer"


def fail(message: str) -> None:
    """Ends as a rank that raised, in torchelastic's words."""
    told = {
        "message": message,
        "extraInfo": {"py_callstack": f"Traceback of {RANK}\n", "timestamp": str(int(time.time()))},
    }
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": told}))
    sys.exit(1)


def one_raises(folder: Path) -> None:
    """Rank 1 raises; rank 0 loses it, and its error file is the older one: clocks of nodes differ."""
    if RANK == 0:
        fail(LOST)
    time.sleep(1)
    fail("ValueError: boom")


def one_is_killed(folder: Path) -> None:
    """Rank 1 is killed; rank 0 loses it."""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    fail(LOST)


def stops_once(folder: Path) -> None:
    """Waits for SIGUSR2 and saves, the first time; is done the second time."""
    if (folder / f"saved-{RANK}").exists():
        return write_status({"state": "done"}) if RANK == 0 else None
    if RANK == 0:
        write_status({"state": "training", "step": 1})
    asked: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, _: asked.append(number))
    (folder / f"ready-{RANK}").touch()
    while not asked:
        time.sleep(0.02)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    (folder / f"saved-{RANK}").touch()
    if RANK == 0:
        write_status({"state": "preempted", "step": 4, "saved": True})


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
