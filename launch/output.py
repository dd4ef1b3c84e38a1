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

    A line that cannot be written, as where the disk of the log is full, is left out: the ranks must not wait for it.
    """

    def __init__(self, later: Path, max_bytes: int = MAX_BYTES):
        self.later, self.max_bytes = later, max_bytes
        self.size = 0
        self.file: TextIO | None = None

    def write(self, line: str) -> None:
        """Writes a line at once."""
        self.size += len(line.encode(errors="replace"))
        if self.size > self.max_bytes:
            self._begin_file(len(line.encode(errors="replace")))
        with suppress(OSError):
            file = self.file or sys.stderr
            file.write(line)
            file.flush()

    def close(self) -> None:
        """Closes the file, and tells where the newest lines are."""
        if self.file:
            say(f"the newest output of the ranks is in {self.later}")
            with suppress(OSError):
                self.file.close()

    def _begin_file(self, num_bytes: int) -> None:
        """Begins the file of the lines that follow, of which the next has `num_bytes`."""
        with suppress(OSError):
            if self.file is None:
                size = shown_bytes(self.max_bytes)
                say(f"the log has {size} of this start: the output that follows is in {self.later}")
            else:
                self.file.close()
                self.later.replace(self.later.with_name(self.later.name.replace(".later.", ".before.")))
            self.file = self.later.open("w", encoding="utf-8", errors="replace")
            self.size = num_bytes
