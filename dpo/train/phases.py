"""The seconds that a start takes until the end of its first step, by phase."""

import os
import time

from dpo.base.processes import find_process


class Phases:
    """Measures the phases of a start, one after the other: each lasts from the end of the one before."""

    def __init__(self, begun: float) -> None:
        """Begins the first phase at `begun`, on the monotonic clock."""
        self.seconds: dict[str, float] = {}
        """The seconds of each phase that has ended, in their order."""
        self._since = begun

    def end(self, name: str) -> None:
        """Ends the phase that runs, by its name; the next one begins."""
        now = time.monotonic()
        self.seconds[name], self._since = now - self._since, now

    def line(self) -> str:
        """Returns the seconds of all phases and of each: `14.2 s: imports 4.1, ranks 0.2, ...`."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {parts}"


def process_start() -> float:
    """Returns when this process was started, on the monotonic clock."""
    own = find_process(os.getpid())
    assert own is not None, "this process runs"
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - own.started / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age
