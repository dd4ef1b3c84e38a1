"""Draws lines and one progress bar on stderr: with rich where it is a terminal, as plain text elsewhere.

rich is imported when the first line is drawn on a terminal, since its import takes a tenth of a second. All texts reach
it as `Text`, so that brackets in them are not read as its markup.

A terminal that was closed, or a reader of stderr that is gone, ends no run: what cannot be drawn is lost.
"""

import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SECONDS_BETWEEN_DRAWINGS = 0.1
"""Minimum time between two drawings of a bar. No thread draws it: it would take the GIL from the training thread."""

STYLES = (
    (re.compile(r"WARNING:"), "bold yellow"),
    (re.compile(r"error:"), "bold red"),
    (re.compile(r"\w+ +\d+/\d+(?=  )"), "bold cyan"),
    (re.compile(r"\S.{0,30}?(?=  )"), "bold cyan"),
)
"""Patterns of the beginning of a line, and the style of what they match: the third is `step  1/20`, the fourth another
name before two spaces.
"""


def is_terminal() -> bool:
    """Returns whether stderr is a terminal."""
    return sys.stderr.isatty()


def has_bars() -> bool:
    """Returns whether stderr is a terminal that can draw a line again; one with `TERM=dumb` cannot."""
    return is_terminal() and not _console().is_dumb_terminal


class Bar:
    """A progress bar below the lines of a terminal.

    Args:
        label: the name of the phase.
        total: units of the whole phase.
        unit: the name of a unit.
        done: units that are already complete.
        has_eta: whether the bar tells the time that is left.
    """

    def __init__(self, label: str, total: int, unit: str, done: int, has_eta: bool):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed
        from rich.progress import TimeRemainingColumn as Remaining

        time_column = (TextColumn("eta"), Remaining()) if has_eta else (Elapsed(),)
        columns = (TextColumn(label, markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit, markup=False))
        self.console = _console()
        self.progress = Progress(
            *columns,
            *time_column,
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,  # results stay on stdout; what libraries write to stderr comes above the bar
        )
        self.task = self.progress.add_task(label, total=total, completed=done)
        self.total, self.done, self.drawn = total, done, 0.0

    def advance(self, count: int) -> None:
        """Adds `count` units, and draws the bar where it was not drawn just before."""
        self.done += count
        now = time.monotonic()
        is_due = now - self.drawn > SECONDS_BETWEEN_DRAWINGS or self.done >= self.total
        self.progress.update(self.task, completed=self.done)
        if is_due:
            self.drawn = now
            with suppress(OSError):
                self.progress.refresh()


class Terminal(logging.Handler):
    """Writes each record to stderr as one line, above the progress bar if one is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Bar | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        line = self.format(record)
        with suppress(OSError):
            if is_terminal() or self.bar:
                console = self.bar.console if self.bar else _console()
                console.print(styled(line), soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)

    @contextmanager
    def showing(self, bar: Bar) -> Iterator[None]:
        """Shows a bar during the with-block; nothing of it stays on the terminal."""
        with suppress(OSError):
            bar.progress.start()
            bar.console.show_cursor(True)  # rich hides it, and a killed process could not show it again
        self.bar = bar
        try:
            yield
        finally:
            self.bar = None
            with suppress(OSError):
                bar.progress.stop()


def styled(line: str) -> "Text":
    """Returns the line with the style of its beginning (STYLES)."""
    from rich.text import Text

    text = Text(line)
    for pattern, style in STYLES:
        if found := pattern.match(line):
            text.stylize(style, *found.span())
            break
    return text


def _console() -> "Console":
    """Returns a console on the present stderr; rich reads NO_COLOR and TERM."""
    from rich.console import Console

    options: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    return Console(file=sys.stderr, force_terminal=None, **options)
