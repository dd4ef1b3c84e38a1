"""Runs torchrun as a child process: passes signals to its ranks, ends it in time, and keeps the end of its stderr.

SLURM sends SIGUSR2 when the time is up or the job is preempted. The signal is for the ranks, which save and exit.
torchrun has no handler for it and would die of it, leaving its ranks behind, so torchrun is started with the signal
ignored, and this process sends the signal to the ranks directly.
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

from dpo.base.limits import raise_limit

_POLL_SECONDS = 0.2
_REPEAT_SECONDS = 1.0
"""SIGUSR2 is sent again this often: a rank that is still importing ignores it."""
_PEER_SECONDS = 30.0
"""How long a node waits, after another node has failed, for its own ranks to notice and end."""
_TERM_SECONDS = 10.0
"""Time between SIGTERM to torchrun and SIGKILL to all its descendants; a tenth of `grace` if that is shorter."""
_KEPT_LINES = 2000
_TORCHRUN = "torch.distributed.run"


class Signals:
    """Records signals. The handlers only set attributes, so that no operation is interrupted half-way."""

    def __init__(self, goes_on: Callable[[], bool | None]) -> None:
        self.stop_since: float | None = None
        """Time of the first SIGUSR2 or SIGTERM, on the monotonic clock."""
        self.ended = False
        """SIGTERM was received, and the job must not start again."""
        self._goes_on = goes_on
        self._in_question = False

    def on_stop(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGUSR2: the ranks must save and exit."""
        self.stop_since = self.stop_since or time.monotonic()

    def on_end(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGTERM: a preemption that leaves time to save, or the end of the job. Saving begins in both cases;
        `look` finds out which it is.
        """
        self.on_stop(number, frame)
        self._in_question = True

    def look(self) -> None:
        """Asks `goes_on` what a SIGTERM means, if one was received. Without an answer the next call asks again."""
        if self._in_question:
            self._in_question = False  # before asking, since another SIGTERM may come meanwhile
            answer = self._goes_on()
            self._in_question = self._in_question or answer is None
            self.ended = self.ended or answer is False


@contextmanager
def signals(goes_on: Callable[[], bool | None]) -> Iterator[Signals]:
    """Records SIGUSR2 and SIGTERM during a with-block. After it SIGUSR2 is ignored, since a late signal must not
    restart a job that is done.

    Args:
        goes_on: returns whether the job should save and start again after SIGTERM; None: not known yet.
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
    """The result of torchrun."""

    exit_code: int
    stderr: str
    """The last lines of torchrun and its ranks; empty if stderr is a terminal."""


def run(
    words: Sequence[str], env: Mapping[str, str], noted: Signals, grace: float, peer_failed: Callable[[], bool]
) -> Ended:
    """Runs torchrun to its end.

    Args:
        words: the command line of torchrun.
        env: its environment.
        noted: the signals of this process.
        grace: seconds that the ranks have to exit after a signal; then they are killed.
        peer_failed: returns whether another node's torchrun has failed; called about once per second.
    """
    # The ranks write to a terminal directly, for their progress bar; their lines are then not kept.
    stderr = None if sys.stderr.isatty() else subprocess.PIPE
    process = subprocess.Popen(words, env=dict(env), stderr=stderr, text=True, errors="replace", preexec_fn=_prepare)
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    copier = threading.Thread(target=_copy, args=(process.stderr or nullcontext(()), kept), daemon=True)
    copier.start()
    try:
        _wait(process, noted, grace, peer_failed)
    finally:
        _end(process, _TERM_SECONDS)  # does nothing unless an exception, such as Ctrl-C, ended the wait
        copier.join(timeout=5)  # a process that a rank left behind may keep the pipe open
    return Ended(process.returncode, "".join(kept))


def _prepare() -> None:
    """Ignores SIGUSR2, and raises the limit of open file descriptors: the torchrun of the first node holds a connection
    to every rank. Runs in the child before exec; torchrun and the ranks inherit both.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    raise_limit()


def _copy(source: AbstractContextManager[Iterable[str]], kept: deque[str]) -> None:
    """Prints and keeps all lines of torchrun. Must not stop reading, since the ranks block once the pipe is full."""
    with source as lines:
        for line in lines:
            kept.append(line)
            with suppress(OSError):  # for example the disk of the log is full
                sys.stderr.write(line)
                sys.stderr.flush()


def _wait(process: subprocess.Popen[str], noted: Signals, grace: float, peer_failed: Callable[[], bool]) -> None:
    """Waits until torchrun ends: by itself, `grace` seconds after a signal, or after the failure of another node."""
    deadline, repeat_at = float("inf"), 0.0
    while process.poll() is None:
        now = time.monotonic()
        if now >= repeat_at:
            repeat_at = now + _REPEAT_SECONDS
            noted.look()
            if noted.stop_since is not None and not noted.ended:
                send(signal.SIGUSR2, children(torchrun_of(process.pid)))
            if deadline == float("inf") and peer_failed():
                deadline = now + _PEER_SECONDS
        if noted.stop_since is not None:
            deadline = min(deadline, noted.stop_since + grace)
        if noted.ended or now >= deadline:
            _end(process, min(_TERM_SECONDS, grace / 10))
        time.sleep(_POLL_SECONDS)


def _end(process: subprocess.Popen[str], patience: float) -> None:
    """Ends torchrun and its descendants: sends SIGTERM to torchrun, after `patience` seconds SIGKILL, and then SIGKILL
    to all descendants that are left.
    """
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


def torchrun_of(pid: int) -> int:
    """Returns the process of torchrun: the innermost that has torchrun in its command line, since a container's
    program that was started with the same words may stay above it. `pid` where there is none yet.
    """
    found = [below for below in [pid, *descendants(pid)] if _TORCHRUN in _words(below)]
    return found[-1] if found else pid


def _words(pid: int) -> list[str]:
    """Returns the command line of a process; nothing where it has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def children(pid: int) -> list[int]:
    """Returns the ids of the running child processes of a process."""
    return [child for child, parent in _parents().items() if parent == pid]


def descendants(pid: int) -> list[int]:
    """Returns the ids of the children of a process, their children, and so on."""
    parents = _parents()
    below, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        below += new
    return below


def _parents() -> dict[int, int]:
    """Returns process id -> id of the parent process, of all processes on this machine."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # the process has just ended
            continue
        parents[int(path.parent.name)] = int(after_name[1])
    return parents


def send(number: int, pids: Sequence[int]) -> None:
    """Sends a signal to processes. Processes that have ended meanwhile are skipped."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
