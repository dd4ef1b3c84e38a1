"""Log lines and progress bars of rank 0, on stderr. `--quiet` silences all but warnings and errors."""

import logging
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
"""Minimum time between progress lines where stderr is no terminal, and therefore shows no bar."""


class _AboveTheBar(logging.Handler):
    """Writes log records to stderr, above the progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(harmless(self.format(record)), file=sys.stderr)
        sys.stderr.flush()


LOG = logging.getLogger("dpo")
LOG.addHandler(_AboveTheBar())
LOG.setLevel(logging.INFO)
LOG.propagate = False


def set_quiet(quiet: bool) -> None:
    """Silences `say` and progress bars from now on, or turns them on again."""
    LOG.setLevel(logging.WARNING if quiet else logging.INFO)


def is_quiet() -> bool:
    """Returns whether `say` is silent."""
    return not LOG.isEnabledFor(logging.INFO)


def say(line: str) -> None:
    """Prints one line for the user, unless `--quiet` was given."""
    LOG.info(line)


def warn(line: str) -> None:
    """Prints one line of warning, also with `--quiet`."""
    LOG.warning(f"WARNING: {line}")


class Progress:
    """Shows the progress of one long phase: a bar on a terminal, elsewhere a line every `SECONDS_BETWEEN_LINES`.

    `shown` is False on ranks that print nothing. `lines_elsewhere` is False where the caller prints lines of its own.
    """

    def __init__(self, label: str, total: int, unit: str, shown: bool, done: int, lines_elsewhere: bool):
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.shown = shown and not is_quiet()
        disable = None if self.shown else True  # None: tqdm is silent where there is no terminal
        self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, disable=disable, leave=False)
        self.lines_elsewhere = lines_elsewhere
        self.spoke = time.monotonic()

    def advance(self, count: int, metrics: Mapping[str, str] | None = None) -> None:
        """Adds `count` units to the progress and shows the metrics beside it."""
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
    """Shows the progress of a phase during a with-block, as `Progress` does.

    Args:
        label: the name of the phase.
        total: units of the whole phase.
        unit: the name of a unit, such as `completions`.
        shown: False on ranks that print nothing.
        done: units that are already complete.
        lines_elsewhere: False where the caller prints lines of its own.
    """
    bar = Progress(label, total, unit, shown, done, lines_elsewhere)
    try:
        yield bar
    finally:
        bar.bar.close()


CONTROL_PICTURES = 0x2400  # first of the Unicode block that pictures control characters: ␀, ␁, …


UNSEEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")  # Unicode categories: control, format, private, surrogate, separators


def visible(text: str) -> str:
    """Returns `text` with every invisible character shown: ↵ before each line feed, ⇥ for a tab, the others as in
    `harmless`.
    """
    return harmless(text.replace("\n", "↵\n").replace("\t", "⇥"))


def harmless(text: str) -> str:
    """Returns `text` without characters that could steer a terminal: control and format characters become a picture
    (␛) or a number (<U+202E>); line feeds and tabs stay.
    """
    return "".join(character if character in "\n\t" else _shown(character) for character in text)


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(CONTROL_PICTURES + code)
    return f"<U+{code:04X}>" if unicodedata.category(character) in UNSEEN else character
