"""Signals that ask a run to save and end: recorded by the parent, passed on to the ranks as SIGUSR2.

    sent to                                      parent                    rank
    the parent, or a terminal's processes        notes it, asks the ranks  gets SIGUSR2 from the parent
    all processes: systemd, scancel, a container notes it, asks the ranks  takes it as SIGUSR2, and gets one more
    a rank alone                                                           takes it as SIGUSR2

Handlers note a signal and do nothing else, so that they interrupt nothing half-way.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""Signals that ask the run to save and end: Ctrl-C, a scheduler, a closed terminal, SLURM's warning."""

LEFT_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Signals that stay ignored where they are: a shell's `&` ignores Ctrl-C, and nohup a closed terminal."""

ONE_STOP_SECONDS = 1.0
"""Signals that come closer together are one stop: timeout(1) sends SIGTERM to its child and to their process group, and
a closed terminal sends SIGHUP as the shell does."""


def heard_here() -> list[signal.Signals]:
    """Returns the signals of ASKING that this process does not leave ignored."""
    return [number for number in ASKING if not (number in LEFT_IGNORED and signal.getsignal(number) == signal.SIG_IGN)]


@contextmanager
def noted_stops() -> Iterator[list[int]]:
    """Yields the list of stops that came, in order: the first signal of each. After the block, in which the exit code
    was decided, the signals are ignored.
    """
    noted: list[int] = []
    times: list[float] = []

    def note(number: int, _: object) -> None:
        now = monotonic()
        if not times or now - times[-1] >= ONE_STOP_SECONDS:
            noted.append(number)
            times.append(now)

    heard = heard_here()
    for number in heard:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """Blocks the signals of ASKING in a with-block. A process that is started in the block inherits that: they wait
    until it unblocks them (`take_stops`), where they would otherwise kill a Python that is still importing. After the
    block SIGQUIT has its handler of before: torch sets one that raises.
    """
    handler = signal.getsignal(signal.SIGQUIT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*ASKING, signal.SIGQUIT})
    try:
        yield
    finally:
        signal.signal(signal.SIGQUIT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_stops() -> None:
    """Takes each signal of ASKING in a rank as SIGUSR2, which waits until the program listens for it
    (`dpo.distributed.preemption.listen_for_stop`); for ever where the program never does. The parent ends such a rank.
    """
    others = [number for number in heard_here() if number != signal.SIGUSR2]
    for number in others:
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGUSR2))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ASKING, signal.SIGQUIT} - {signal.SIGUSR2})
