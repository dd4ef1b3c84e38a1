"""Signals of the parent: recorded, so that a handler interrupts nothing half-way."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""Signals that ask the run to save and end: Ctrl-C, a scheduler, a closed terminal, SLURM's warning."""

LEFT_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Signals that stay ignored where they are: a shell's `&` ignores Ctrl-C, and nohup a closed terminal."""


@contextmanager
def noted_stops() -> Iterator[list[int]]:
    """Yields the list of signals of ASKING that came, in order."""
    noted: list[int] = []
    left = [number for number in LEFT_IGNORED if signal.getsignal(number) == signal.SIG_IGN]
    handled = [number for number in ASKING if number not in left]
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in handled}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back(number: signal.Signals) -> Iterator[None]:
    """Blocks a signal in a with-block. A process that is started in the block inherits that: the signal waits until the
    process unblocks it (`dpo.distributed.preemption.listen_for_stop`). Otherwise it would kill a Python that is still
    importing.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
