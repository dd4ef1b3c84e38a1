"""SIGUSR2 asks a run to save and leave: a cluster sends it before it takes the machine back (`launch/node.py`)."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

StopRequest = Callable[[], bool]
"""Whether this process was asked to stop; the ranks agree on it where they meet anyway."""


def never() -> bool:
    """The StopRequest of a program that cannot go on later: a signal ends it."""
    return False


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Catches SIGUSR2 for the length of a with-block, and ignores it from then on.

    One that came while Python ends would kill the process, and a run that has saved would look like one that failed.
    """
    caught: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, _: caught.append(number))
    try:
        yield lambda: bool(caught)
    finally:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
