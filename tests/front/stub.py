"""A program without torch that stands for the trainer under `dpo NAME --ranks N`: `MODE FOLDER`.

Each rank writes its process id to FOLDER/pid-RANK once it is where the mode says.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.command.status import write_status
from dpo.distributed.preemption import listen_for_stop
from dpo.terminal.console import say

FIRST, SAVED = 5, 7
"""The first step of this start, and the step that is saved."""


def arrive(folder: Path) -> None:
    """Tells the test that this rank is there, with the environment that it was given."""
    draft = folder / f"draft-{os.environ['RANK']}"
    draft.write_text(json.dumps({"pid": os.getpid(), **os.environ}))
    draft.rename(folder / f"rank-{os.environ['RANK']}")


def begin() -> None:
    """Rank 0 tells that the steps begin."""
    if os.environ["RANK"] == "0":
        write_status({"state": "training", "step": FIRST})


def pause() -> None:
    """Waits for ever, whatever signals this rank takes."""
    while True:
        signal.pause()


def preparing(folder: Path) -> None:
    """Has not begun its steps, and never does."""
    arrive(folder)
    pause()


def end_when_asked(folder: Path, status: Mapping[str, Any]) -> None:
    """Trains until it is asked to stop; rank 0 then tells `status`."""
    with listen_for_stop() as stop_requested:
        begin()
        arrive(folder)
        while not stop_requested():
            say("step")
            time.sleep(0.02)
    if os.environ["RANK"] == "0":
        write_status(status)
        (folder / "ended").write_text(json.dumps(status))


def training(folder: Path) -> None:
    """Trains until it is asked to stop, and saves."""
    end_when_asked(folder, {"state": "preempted", "step": SAVED, "saved": True})


def evaluating(folder: Path) -> None:
    """Is asked to stop in the evaluation before its first step: nothing is saved."""
    end_when_asked(folder, {"state": "preempted", "step": FIRST - 1, "saved": False})


def ending(folder: Path) -> None:
    """Ends by itself after it was asked to stop."""
    end_when_asked(folder, {"state": "done"})


def importing(folder: Path) -> None:
    """As `training`, but rank 1 listens only once the test has put a file."""
    while os.environ["RANK"] == "1" and not (folder / "listen").exists():
        if not (folder / "rank-1").exists():
            arrive(folder)
        time.sleep(0.02)
    training(folder)


def stuck(folder: Path) -> None:
    """Is asked to stop and does not."""
    with listen_for_stop():
        begin()
        arrive(folder)
        pause()


def saved(folder: Path) -> None:
    """Rank 0 has saved, and does not end."""
    with listen_for_stop() as stop_requested:
        begin()
        arrive(folder)
        while not stop_requested():
            time.sleep(0.02)
        write_status({"state": "preempted", "step": SAVED, "saved": True})
        (folder / "saved").touch()
        pause()


def done(folder: Path) -> None:
    """Rank 0 is done, and does not end."""
    with listen_for_stop():
        begin()
        write_status({"state": "done"})
        arrive(folder)
        pause()


def waiting_for_rank_0(folder: Path) -> None:
    """As `training`, but rank 1 is done already."""
    if os.environ["RANK"] == "0":
        training(folder)
    else:
        arrive(folder)


def killed(folder: Path) -> None:
    """Rank 1 is killed, as by the kernel where memory runs out; rank 0 waits for it."""
    arrive(folder)
    if os.environ["RANK"] == "1":
        while not (folder / "rank-0").exists():  # else the parent may kill rank 0 before it is there
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    pause()


def fine(folder: Path) -> None:
    """Does its work."""
    arrive(folder)


MODES = (preparing, training, importing, stuck, saved, done, evaluating, ending, waiting_for_rank_0, killed, fine)

if __name__ == "__main__":
    {mode.__name__: mode for mode in MODES}[sys.argv[1]](Path(sys.argv[2]))
