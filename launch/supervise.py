"""torchrun as a child of the launcher: signals reach its ranks, it ends in time, and what it says is kept.

SIGUSR2 (SLURM: the time is up, or the job is preempted) is for the ranks, which save and end. torchrun itself does not
know the signal and would die of it, leaving its ranks behind: it ignores it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_POLL_SECONDS = 0.2
_REPEAT_SECONDS = 1.0
"""SIGUSR2 is sent again this often: a rank that is still importing ignores it."""
_PEER_SECONDS = 30.0
"""A node whose ranks do not notice that another node has failed waits this long for them."""
_TERM_SECONDS = 10.0
"""Between SIGTERM to torchrun and SIGKILL to all below it; a tenth of the time of grace where that is less."""
_KEPT_LINES = 2000


class Signals:
    """What came in since it was installed: handlers only take notes, so that nothing is interrupted half-way."""

    def __init__(self, goes_on: Callable[[], bool | None]) -> None:
        self.stop_since: float | None = None
        """When SIGUSR2 or SIGTERM came first, on the monotonic clock."""
        self.ended = False
        """SIGTERM came, and the job is not meant to go on."""
        self._goes_on = goes_on
        self._in_question = False

    def on_stop(self, number: int, frame: FrameType | None) -> None:
        """SIGUSR2."""
        self.stop_since = self.stop_since or time.monotonic()

    def on_end(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM: a preemption that leaves time to save, or the end. Saving may begin before it is known which."""
        self.on_stop(number, frame)
        self._in_question = True

    def look(self) -> None:
        """Settles what a SIGTERM means, or leaves it open for the next look where nobody answers."""
        if self._in_question:
            self._in_question = False  # before the question: another SIGTERM may come meanwhile
            answer = self._goes_on()
            self._in_question = self._in_question or answer is None
            self.ended = self.ended or answer is False


@contextmanager
def signals(goes_on: Callable[[], bool | None]) -> Iterator[Signals]:
    """Notes SIGUSR2 and SIGTERM for the length of a with-block; after it SIGUSR2 is ignored: one that comes late must
    not start a job again that is done.

    goes_on(): whether the job is meant to go on although SIGTERM came; null: not known yet.
    """
    noted = Signals(goes_on)
    signal.signal(signal.SIGUSR2, noted.on_stop)
    before = signal.signal(signal.SIGTERM, noted.on_end)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Ended:
    """How torchrun ended."""

    exit_code: int
    stderr: str
    """Its last lines, and those of its ranks."""


def run(
    words: Sequence[str], env: Mapping[str, str], noted: Signals, grace: float, peer_failed: Callable[[], bool]
) -> Ended:
    """Runs torchrun to its end.

    grace: seconds that the ranks have to end after a signal; then they are ended. peer_failed() is asked now and then:
    whether another node's torchrun has failed.
    """
    # A terminal is left to the ranks, for their progress bar; what they say is then not kept.
    stderr = None if sys.stderr.isatty() else subprocess.PIPE
    process = subprocess.Popen(
        words, env=dict(env), stderr=stderr, text=True, errors="replace", preexec_fn=_ignore_stop
    )
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    copier = threading.Thread(target=_copy, args=(process.stderr or nullcontext(()), kept), daemon=True)
    copier.start()
    try:
        _wait(process, noted, grace, peer_failed)
    finally:
        _end(process, _TERM_SECONDS)  # nothing to do but for an exception: Ctrl-C
        copier.join(timeout=5)  # a process that a rank left behind may hold the pipe
    return Ended(process.returncode, "".join(kept))


def _ignore_stop() -> None:
    """Runs in the child before torchrun: an ignored signal stays ignored through exec, in its ranks too."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _copy(source: AbstractContextManager[Iterable[str]], kept: deque[str]) -> None:
    """Shows and keeps lines until the last; what stops reading stops the ranks, which wait for a pipe that is full."""
    with source as lines:
        for line in lines:
            kept.append(line)
            with suppress(OSError):  # the disk of the log is full, for one
                sys.stderr.write(line)
                sys.stderr.flush()


def _wait(process: subprocess.Popen[str], noted: Signals, grace: float, peer_failed: Callable[[], bool]) -> None:
    """Until torchrun ends, by itself or because it must."""
    deadline, repeat_at = float("inf"), 0.0
    while process.poll() is None:
        now = time.monotonic()
        if now >= repeat_at:
            repeat_at = now + _REPEAT_SECONDS
            noted.look()
            if noted.stop_since is not None and not noted.ended:
                send(signal.SIGUSR2, children(process.pid))
            if deadline == float("inf") and peer_failed():
                deadline = now + _PEER_SECONDS
        if noted.stop_since is not None:
            deadline = min(deadline, noted.stop_since + grace)
        if noted.ended or now >= deadline:
            _end(process, min(_TERM_SECONDS, grace / 10))
        time.sleep(_POLL_SECONDS)


def _end(process: subprocess.Popen[str], patience: float) -> None:
    """Ends torchrun and all below it: first as it likes, then, after `patience` seconds, at once."""
    if process.poll() is not None:
        return
    below = descendants(process.pid)
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        below = descendants(process.pid)
        process.kill()
        process.wait()
    send(signal.SIGKILL, below)


# --- processes, as /proc shows them -----------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """The processes that a process started and that still run."""
    return [child for child, parent in _parents().items() if parent == pid]


def descendants(pid: int) -> list[int]:
    """The children of a process, their children, and so on."""
    parents = _parents()
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def _parents() -> dict[int, int]:
    """Process -> the one that started it, of all that run on this machine."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        parents[int(path.parent.name)] = int(after_name[1])
    return parents


def send(number: int, pids: Sequence[int]) -> None:
    """Sends a signal to processes; those that are gone meanwhile are passed over."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
