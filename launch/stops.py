"""Records the signals that stop a job, and says until when its ranks may save."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end a job: SLURM's or kill's, Ctrl-C, a closed terminal."""

_ONE_STOP_SECONDS = 1.0
"""Signals that come closer together are one: timeout(1) sends SIGTERM to its child and to their process group."""


class Signals:
    """Records signals. The handlers only set attributes, so that no operation is interrupted half-way."""

    def __init__(
        self, goes_on: Callable[[], bool | None] | None, end_seconds: Callable[[], float] | None = None
    ) -> None:
        self.stop_since: float | None = None
        """Time of the first signal, on the monotonic clock."""
        self.ended_by = 0
        """The signal after which the job must not start again; 0: none."""
        self.is_urgent = False
        """The ranks are ended at once: a second signal has come."""
        self._goes_on = goes_on
        self._ask_end_seconds = end_seconds
        self._end_seconds = inf
        self._end_since = 0.0
        self._hurry_until = inf
        self._question_since: float | None = None
        """Time of the first SIGTERM whose meaning is not known yet."""

    @property
    def ended(self) -> bool:
        """Returns whether the job must end, and not start again."""
        return self.ended_by != 0

    def on_stop(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGUSR2: the ranks must save and exit."""
        self.stop_since = self.stop_since or time.monotonic()

    def on_end(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGTERM, Ctrl-C and SIGHUP: the end of the job, or of SIGTERM a preemption that leaves time to save.
        Saving begins in both cases; `look` finds out which it is.
        """
        self.on_stop(number, frame)
        if self.ended:
            self.is_urgent = self.is_urgent or time.monotonic() - self._end_since >= _ONE_STOP_SECONDS
        elif number == signal.SIGTERM and self._goes_on is not None:
            self._question_since = self._question_since or time.monotonic()
        else:
            self._end(number, time.monotonic())

    def _end(self, number: int, since: float) -> None:
        self._end_since = since  # first, since another signal may come meanwhile
        self.ended_by = number

    @property
    def can_ask(self) -> bool:
        """Returns whether a SIGTERM may mean that the job starts again."""
        return self._goes_on is not None

    @property
    def in_question(self) -> bool:
        """Returns whether it is not known yet if the job may start again."""
        return self._question_since is not None and not self.ended

    def doubt(self) -> None:
        """Has `look` ask, without a signal of this process, as after SIGTERM."""
        if self.can_ask and self.stop_since is None:
            self._question_since = time.monotonic()

    def hurry(self, seconds: float) -> None:
        """Ends the ranks after so many seconds, if that is sooner: they have little to save, or nothing."""
        self._hurry_until = time.monotonic() + seconds

    def look(self) -> None:
        """Asks `goes_on` what a SIGTERM means, if one was received, and at the end of the job `end_seconds`, once.
        Without an answer the next call asks again. Takes as long as the answers.
        """
        since = self._question_since
        if since is not None and self._goes_on is not None and not self.ended:
            self._question_since = None  # before asking, since another SIGTERM may come meanwhile
            answer = self._goes_on()
            if answer is None:
                self._question_since = since
            elif not answer and not self.ended:
                self._end(signal.SIGTERM, since)
        if self.ended and self._ask_end_seconds is not None:
            ask, self._ask_end_seconds = self._ask_end_seconds, None
            self._end_seconds = ask()

    def seconds(self, grace: float) -> float:
        """Returns how long the ranks may save: `end_seconds` where the job ends (any time until `look` has asked for
        it), else `grace`.
        """
        return self._end_seconds if self.ended else grace

    def deadline(self, grace: float) -> float:
        """Returns when ranks that still run are ended, on the monotonic clock."""
        if self.is_urgent:
            return 0.0
        since = self._end_since if self.ended else self.stop_since
        return inf if since is None else min(self._hurry_until, since + self.seconds(grace))


@contextmanager
def signals(
    goes_on: Callable[[], bool | None] | None, end_seconds: Callable[[], float] | None = None
) -> Iterator[Signals]:
    """Records signals during a with-block. After it SIGUSR2 is ignored, since a late signal must not restart a job that
    is done.

    Args:
        goes_on: returns whether the job should save and start again after SIGTERM; None: not known yet. Without this
            function SIGTERM always ends the job.
        end_seconds: returns how long the ranks may save after a signal that ends the job: less than what the machine
            leaves before it sends SIGKILL. Without this function any time.
    """
    noted = Signals(goes_on, end_seconds)
    signal.signal(signal.SIGUSR2, noted.on_stop)
    before = {number: signal.signal(number, noted.on_end) for number in _heard()}
    try:
        yield noted
    finally:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        for number, handler in before.items():
            signal.signal(number, handler)


def _heard() -> list[signal.Signals]:
    """Returns the signals of ENDING, without Ctrl-C where a shell's `&` ignores it, and SIGHUP where nohup does."""
    return [number for number in ENDING if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN]
