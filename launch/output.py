"""The output of torchrun and its ranks in the log of a job, which is bounded: SLURM and the background hold the log
open, so it cannot be renamed, and a library may print a line per step for weeks.

    log                            the first MAX_BYTES of each start of each node, and all that the launcher says
    attempt-0/node-0.later.txt     what follows, the newest; of MAX_BYTES it becomes
    attempt-0/node-0.before.txt    the output before that
"""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from dpo.base.units import shown_bytes
from dpo.terminal.console import say

MAX_BYTES = 32 * 2**20


class Output:
    """Writes lines to stderr, of MAX_BYTES at most, and the lines that follow to `later`.

    A line that cannot be written, as where the disk of the log is full, is left out and counted: the ranks must not
    wait for it. `close` may be called while another thread writes.
    """

    def __init__(self, later: Path, max_bytes: int = MAX_BYTES):
        self.later, self.max_bytes = later, max_bytes
        self.size = self.left_out = 0
        self.is_log_full = False
        self.file: TextIO | None = None
        """Of the lines that follow; None where it could not be made."""

    def write(self, line: str) -> None:
        """Writes a line at once. Raises nothing."""
        num_bytes = len(line.encode(errors="replace"))
        self.size += num_bytes
        if self.size > self.max_bytes and (self.file or not self.is_log_full):
            self._begin_file()
            self.size = num_bytes
        file = self.file if self.is_log_full else sys.stderr
        self.left_out += not (file and _is_written(file, line))

    def close(self) -> None:
        """Closes the file, and tells where the newest lines are. Lines that still come are left out."""
        file, self.file, self.is_log_full = self.file, None, True
        if self.left_out:
            say(f"{self.left_out} lines of the output of the ranks are left out")
        if file:
            say(f"the newest output of the ranks is in {self.later}")
            with suppress(OSError):
                file.close()

    def _begin_file(self) -> None:
        """Begins the file of the lines that follow; says it of the first one, and where there is none from now on."""
        full, is_first = f"the log has {shown_bytes(self.max_bytes)} of this start", not self.is_log_full
        old, self.file, self.is_log_full = self.file, None, True
        if old:
            with suppress(OSError):  # the disk is full; it is closed all the same
                old.close()
            with suppress(OSError):
                self.later.replace(self.later.with_name(self.later.name.replace(".later.", ".before.")))
        try:
            self.file = self.later.open("w", encoding="utf-8", errors="replace")
        except OSError as failure:
            why = f"{self.later} cannot be made: {failure.strerror}"
            say(f"{full}: the output that follows is left out, since {why}")
        else:
            if is_first:
                say(f"{full}: the output that follows is in {self.later}")


def _is_written(file: TextIO, line: str) -> bool:
    """Writes a line; returns whether that succeeded."""
    try:
        file.write(line)
        file.flush()
    except (OSError, ValueError):  # the disk is full; `Output.close` has closed the file meanwhile
        return False
    return True
