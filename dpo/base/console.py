"""How rank 0 tells what it does: lines, and a bar for what takes long; `--quiet` leaves warnings and errors."""

import logging
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal, a bar becomes a line at most this often."""


class _AboveTheBar(logging.Handler):
    """Writes records to stderr, above a bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(harmless(self.format(record)), file=sys.stderr)
        sys.stderr.flush()


LOG = logging.getLogger("dpo")
LOG.addHandler(_AboveTheBar())
LOG.setLevel(logging.INFO)
LOG.propagate = False


def set_quiet(quiet: bool) -> None:
    """Whether `say` and bars are silent from now on."""
    LOG.setLevel(logging.WARNING if quiet else logging.INFO)


def is_quiet() -> bool:
    """Whether `say` is silent."""
    return not LOG.isEnabledFor(logging.INFO)


def say(line: str) -> None:
    """One line for people."""
    LOG.info(line)


def warn(line: str) -> None:
    """One line that `--quiet` does not silence."""
    LOG.warning(f"WARNING: {line}")


class Progress:
    """The bar of one long phase on a terminal; elsewhere a plain line now and then, unless who works tells its own."""

    def __init__(self, label: str, total: int, unit: str, shown: bool, done: int, lines_elsewhere: bool):
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.shown = shown and not is_quiet()
        disable = None if self.shown else True  # None: tqdm is silent where there is no terminal
        self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, disable=disable, leave=False)
        self.lines_elsewhere = lines_elsewhere
        self.spoke = time.monotonic()

    def advance(self, count: int, metrics: Mapping[str, str] | None = None) -> None:
        """Moves on by `count` and shows the metrics."""
        self.done += count
        if not self.bar.disable:
            self.bar.set_postfix(metrics or {}, refresh=False)
            self.bar.update(count)
        elif self.shown and self.lines_elsewhere and self._is_time_for_a_line():
            self.spoke = time.monotonic()
            rest = "".join(f"  {name} {metric}" for name, metric in (metrics or {}).items())
            say(f"{self.label}: {self.done}/{self.total} {self.unit}{rest}")

    def _is_time_for_a_line(self) -> bool:
        return self.done >= self.total or time.monotonic() - self.spoke > SECONDS_BETWEEN_LINES


@contextmanager
def progress(
    label: str, total: int, unit: str, shown: bool, done: int = 0, lines_elsewhere: bool = True
) -> Iterator[Progress]:
    """A bar of `total` units for the length of a with-block; lines_elsewhere: see `Progress`."""
    bar = Progress(label, total, unit, shown, done, lines_elsewhere)
    try:
        yield bar
    finally:
        bar.bar.close()


CONTROL_PICTURES = 0x2400  # ␀, ␁, …


UNSEEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")  # Unicode categories: controls, formats, private, separators of lines


def visible(text: str) -> str:
    """A line feed as ↵ before the line's end, a tab as ⇥, other characters that are not seen by picture or number."""
    return harmless(text.replace("\n", "↵\n").replace("\t", "⇥"))


def harmless(text: str) -> str:
    """Line feeds and tabs as they are, other characters that are not seen by picture or number."""
    return "".join(character if character in "\n\t" else _shown(character) for character in text)


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(CONTROL_PICTURES + code)
    return f"<U+{code:04X}>" if unicodedata.category(character) in UNSEEN else character
