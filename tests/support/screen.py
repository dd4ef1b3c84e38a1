"""A pseudo-terminal in the place of stderr, and what it shows."""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


@dataclass
class Screen:
    """A terminal that is `columns` wide, with room for any number of lines, and what was sent to it."""

    columns: int
    sent: str = ""
    lines: list[str] = field(default_factory=lambda: [""])
    row: int = 0
    column: int = 0
    has_cursor: bool = True

    def feed(self, text: str) -> None:
        """Shows a text with the few sequences that programs here send; fails on any other."""
        self.sent += text
        position = 0
        while position < len(text):
            found = SEQUENCE.match(text, position)
            if found:
                self._obey(*found.groups())
                position = found.end()
            else:
                self._put(text[position])
                position += 1

    def _put(self, character: str) -> None:
        assert character in "\r\n" or character.isprintable(), repr(character)
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._down()
        else:
            if self.column == self.columns:
                self._down()
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")

    def _obey(self, number: str, letter: str) -> None:
        if letter == "A":
            self.row -= int(number or 1)
        elif letter == "K":
            assert number == "2"
            self.lines[self.row] = ""
        elif letter in "hl":
            assert number == "?25"
            self.has_cursor = letter == "h"
        else:
            assert letter == "m", letter

    @property
    def shown(self) -> list[str]:
        """The lines with text."""
        return [line.rstrip() for line in self.lines if line.strip()]


@contextmanager
def terminal(columns: int = 100, name: str = "xterm-256color", **environment: str) -> Iterator[Screen]:
    """Gives this process a terminal as its stderr; the screen shows what was sent once the block has ended."""
    ours, theirs = os.openpty()
    screen, sent = Screen(columns), bytearray()
    reader = threading.Thread(target=_read, args=(ours, sent), daemon=True)  # else a full buffer would block the writer
    reader.start()
    with open(theirs, "w", encoding="utf-8", closefd=False) as stream:
        with patch.object(sys, "stderr", stream), patch.dict(os.environ):
            for variable in ("NO_COLOR", "FORCE_COLOR", "LINES"):
                os.environ.pop(variable, None)
            # rich asks the descriptors 0 to 2 for the width, which are another terminal, if any.
            os.environ.update({"TERM": name, "COLUMNS": str(columns)} | environment)
            yield screen
    os.write(theirs, END)
    reader.join()
    screen.feed(sent.decode())
    os.close(theirs)
    os.close(ours)


END = b"\x04\x00"
"""Sent last; no program sends it."""


def _read(descriptor: int, sent: bytearray) -> None:
    """Collects the bytes before END."""
    while not sent.endswith(END):
        sent += os.read(descriptor, 2**16)
    del sent[-len(END) :]
