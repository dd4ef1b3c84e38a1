"""How rank 0 tells what it does: lines, and a bar for what takes long."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal, a bar becomes a line at most this often."""


def say(line: str) -> None:
    """One line on stderr, above a bar if there is one."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """The bar of one long phase on a terminal, else a plain line now and then; silent on ranks other than 0."""

    def __init__(self, label: str, total: int, unit: str, shown: bool, done: int = 0):
        self.label, self.total, self.unit, self.shown, self.done = label, total, unit, shown, done
        self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, disable=None if shown else True, leave=False)
        self.spoke = time.monotonic()

    def advance(self, count: int, figures: Mapping[str, str] | None = None) -> None:
        """Moves on by `count` and shows the figures."""
        self.done += count
        if not self.bar.disable:
            self.bar.set_postfix(figures or {}, refresh=False)
            self.bar.update(count)
        elif self.shown and (self.done >= self.total or time.monotonic() - self.spoke > SECONDS_BETWEEN_LINES):
            self.spoke = time.monotonic()
            rest = "".join(f"  {name} {figure}" for name, figure in (figures or {}).items())
            say(f"{self.label}: {self.done}/{self.total} {self.unit}{rest}")


@contextmanager
def progress(label: str, total: int, unit: str, shown: bool, done: int = 0) -> Iterator[Progress]:
    """A bar of `total` units for the length of a with-block."""
    bar = Progress(label, total, unit, shown, done)
    try:
        yield bar
    finally:
        bar.bar.close()
