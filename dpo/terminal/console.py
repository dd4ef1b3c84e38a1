"""Log lines and progress bars of rank 0, on stderr and in the log of a run.

    say, warn, tell    a line on stderr (`drawing.py`), and in RUN/log.txt (`log_file.py`)
    progress           a bar on a terminal; elsewhere lines

`--quiet` silences all but warnings and errors on stderr; the log has every line all the same.
"""

import json
import logging
import re
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from dpo.terminal.drawing import Bar, Terminal, has_bars
from dpo.terminal.log_file import LogFile

SECONDS_BETWEEN_LINES = 10.0
"""Minimum time between progress lines where stderr is no terminal, and therefore shows no bar."""


class _OneLine(logging.Formatter):
    """Formats each record as one line that no text in it can break or use to steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return in_one_line(super().format(record))


def _with_encodable_message(record: logging.LogRecord) -> bool:
    """Replaces surrogates in a record's message, as of a path that is no UTF-8, which other handlers cannot encode."""
    record.msg = re.sub(r"[\ud800-\udfff]", lambda found: _shown(found[0]), str(record.msg))
    return True


TERMINAL, LOG_FILE = Terminal(), LogFile()
LOG = logging.getLogger("dpo")
for _handler in (TERMINAL, LOG_FILE):
    _handler.setFormatter(_OneLine())
    LOG.addHandler(_handler)
LOG.addFilter(_with_encodable_message)
LOG.setLevel(logging.INFO)
LOG.propagate = False


def set_quiet(quiet: bool) -> None:
    """Silences `say` and progress bars on stderr from now on, or turns them on again."""
    TERMINAL.setLevel(logging.WARNING if quiet else logging.INFO)


def is_quiet() -> bool:
    """Returns whether `say` prints nothing."""
    return TERMINAL.level > logging.INFO


def say(line: str) -> None:
    """Prints one line for the user, unless `--quiet` was given."""
    LOG.info(line)


@contextmanager
def unsaid() -> Iterator[None]:
    """Leaves out, on stderr and in the log, what `say` is given in the block, where another process says the same."""
    before = LOG.level
    LOG.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOG.setLevel(before)


def warn(line: str) -> None:
    """Prints one line of warning, also with `--quiet`."""
    LOG.warning(f"WARNING: {line}")


def tell(line: str) -> None:
    """Prints one line, also with `--quiet`: the line that says how a program ends."""
    LOG.error(line)


# --- the log of a run ------------------------------------------------------------------------------------------------


def begin_log() -> None:
    """Begins the log of a run: no later line goes to the log of an earlier run of this process. Every rank may call it.

    Lines that were said before the first run, such as a warning about versions, belong to that run.
    """
    LOG_FILE.begin()


def open_log(path: Path) -> None:
    """Appends the lines of this run to the file `path`, those that were said since `begin_log` first; for rank 0 alone.

    Where the file cannot be written, a warning says so.
    """
    LOG_FILE.write_to(path)


def log_alone(text: str) -> None:
    """Writes lines to the log alone: those of a traceback, which Python prints itself, or of an end that a launcher
    tells.
    """
    for line in text.splitlines():
        LOG_FILE.handle(LOG.makeRecord(LOG.name, logging.ERROR, "", 0, line, (), None))


# --- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """Shows the progress of one long phase; see `progress`."""

    def __init__(self, label: str, total: int, unit: str, done: int, bar: Bar | None, has_lines: bool):
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.bar, self.has_lines = bar, has_lines
        self.spoke = time.monotonic()

    def advance(self, count: int) -> None:
        """Adds `count` units to the progress."""
        self.done += count
        if self.bar:
            self.bar.advance(count)
        elif self.has_lines and self._is_time_for_a_line():
            self.spoke = time.monotonic()
            say(f"{self.label}: {self.done}/{self.total} {self.unit}")

    def _is_time_for_a_line(self) -> bool:
        return self.done >= self.total or time.monotonic() - self.spoke > SECONDS_BETWEEN_LINES


@contextmanager
def progress(
    label: str, total: int, unit: str, shown: bool, done: int = 0, lines_elsewhere: bool = True
) -> Iterator[Progress]:
    """Shows the progress of a phase during a with-block: a bar on a terminal, elsewhere a line every
    `SECONDS_BETWEEN_LINES`.

    Args:
        label: the name of the phase.
        total: units of the whole phase.
        unit: the name of a unit, such as `completions`.
        shown: False on ranks that print nothing.
        done: units that are already complete.
        lines_elsewhere: False where the caller prints lines of its own, which then tell the time that is left.
    """
    is_shown = shown and not is_quiet()
    bar = Bar(in_one_line(label), total, unit, done, has_eta=lines_elsewhere) if is_shown and has_bars() else None
    with TERMINAL.showing(bar) if bar else nullcontext():
        yield Progress(label, total, unit, done, bar, has_lines=shown and lines_elsewhere)


# --- texts of users --------------------------------------------------------------------------------------------------

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


def in_one_line(text: str) -> str:
    """Returns `text` as `harmless` does, with ↵ in place of line feeds: one line, whatever is in it."""
    return harmless(text).replace("\n", "↵")


def harmless_json(text: str) -> str:
    """Returns a JSON text that means the same and could not steer a terminal: control and format characters become
    escapes, backslash u202e for U+202E.
    """
    seen = [unicodedata.category(character) not in UNSEEN for character in text]
    return "".join(one if is_seen else json.dumps(one)[1:-1] for one, is_seen in zip(text, seen, strict=True))


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(CONTROL_PICTURES + code)
    return f"<U+{code:04X}>" if unicodedata.category(character) in UNSEEN else character
