"""SIGUSR2 asks a run to save and exit. A cluster sends it before it takes the machine back (`launch/node.py`)."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

StopRequest = Callable[[], bool]
"""Returns whether this process was asked to stop. The ranks exchange the answers in a collective of the step."""


def never() -> bool:
    """Returns False: the StopRequest of a program that cannot be resumed, and that SIGUSR2 kills."""
    return False


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Records SIGUSR2 during a with-block, and ignores the signal after it.

    Without a handler SIGUSR2 kills a process. A late signal, while Python exits, would make a run that has saved look
    like a run that failed. A launcher may start the ranks with the signal blocked (`dpo.front.parent`): one that came
    while a rank imported torch is then recorded here.

    Python sets handlers in the main thread alone. In another thread this yields `never`, and the signal does what the
    process has decided.
    """
    if threading.current_thread() is not threading.main_thread():
        yield never
        return
    caught: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, _: caught.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    try:
        yield lambda: bool(caught)
    finally:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
