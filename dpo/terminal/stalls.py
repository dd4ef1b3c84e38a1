"""Tells of a file system that does not answer, as NFS where its server is gone: a write or a read then never returns,
and raises nothing.

    with telling_stalls(path)     notes the block in a table: a few microseconds, several times a step
    one thread of the process     sleeps until the first of the blocks is due, and warns of it on the terminal
    the block returns late        says so on the terminal and in the log, which may be what did not answer before
"""

import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dpo.terminal.drawing import Terminal

STALL_SECONDS = 60.0
LOG = logging.getLogger("dpo")


@dataclass
class Block:
    """A with-block that has not returned."""

    path: Path
    began: float
    """By `time.monotonic`."""
    limit: float
    """Seconds after which it is told next."""
    is_told: bool = False

    @property
    def due(self) -> float:
        """Returns when it is told next."""
        return self.began + self.limit


class Watch:
    """Watches over the open blocks of a process, with one thread that begins at the first of them."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begins without blocks and thread: also in a forked process, which has neither."""
        self.changed = threading.Condition()
        self.blocks: dict[int, Block] = {}
        self.thread: threading.Thread | None = None
        self.wakes = math.inf
        """When the thread looks at the blocks next."""

    def open(self, block: Block) -> None:
        """Watches over a block from now on. Wakes the thread only where it would sleep too long."""
        with self.changed:
            self.blocks[id(block)] = block
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="watch over stalls", daemon=True)
                self.thread.start()
            if block.due < self.wakes:
                self.wakes = block.due
                self.changed.notify()

    def close(self, block: Block) -> None:
        """Forgets a block; one that was opened before a fork is not known."""
        with self.changed:
            self.blocks.pop(id(block), None)

    def _run(self) -> None:
        while True:
            for line in self._wait():
                _show(line)

    def _wait(self) -> list[str]:
        """Waits until the first block may be due; returns the lines of those that are."""
        with self.changed:
            self.wakes = min((block.due for block in self.blocks.values()), default=math.inf)
            self.changed.wait(None if self.wakes == math.inf else max(0.0, self.wakes - time.monotonic()))
            now = time.monotonic()
            return [_line_of(block) for block in self.blocks.values() if block.due <= now]


def _line_of(block: Block) -> str:
    """Returns the line of a block that is due, and puts off the next one until it has taken twice as long."""
    line = f"WARNING: {block.path} has not answered for {block.limit:g} s: is its file system there?"
    block.limit, block.is_told = 2 * block.limit, True
    return line


def _show(line: str) -> None:
    """Shows a line on the terminal alone: a thread that waits for the log holds the log's lock."""
    record = LOG.makeRecord(LOG.name, logging.WARNING, "", 0, line, (), None)
    for handler in LOG.handlers:
        if isinstance(handler, Terminal):
            with suppress(ValueError):  # stderr is closed: the thread must live on
                handler.handle(record)


WATCH = Watch()
os.register_at_fork(after_in_child=WATCH.begin)


@contextmanager
def telling_stalls(path: Path, seconds: float = STALL_SECONDS) -> Iterator[None]:
    """Warns where a with-block that writes or reads `path` takes over `seconds`, and again each time that it has taken
    twice as long. A thread does, since this one waits.
    """
    block = Block(path, time.monotonic(), seconds)
    try:
        WATCH.open(block)
        yield
    finally:
        WATCH.close(block)
        if block.is_told:
            LOG.warning(f"WARNING: {path} has answered after {time.monotonic() - block.began:.3g} s")
