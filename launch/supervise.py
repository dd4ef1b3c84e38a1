"""Runs torchrun as a child process: passes signals to its ranks, ends it in time, and keeps the end of its output.

| signal of this process                              | the ranks                                                   |
|-----------------------------------------------------|-------------------------------------------------------------|
| SIGUSR2: the time is up, or the job is preempted    | save after the step that they are in, and end               |
| SIGTERM of a job that SLURM lets run: a preemption  | the same                                                    |
| Ctrl-C, SIGHUP, any other SIGTERM: `scancel`; of a  | the same; before the first step they are ended at once, in  |
| run on this machine `kill`                          | the reference pass of `dpo.reference` within 10 seconds     |
| a second one of these                               | are ended at once                                           |

The ranks are told by SIGUSR2. torchrun has no handler for it and would die of it, leaving its ranks behind, so torchrun
is started with the signal ignored, and this process sends the signal to the ranks directly. torchrun has a process
group of its own, since it ends its ranks at once when a terminal's Ctrl-C or `kill -- -GROUP` reaches it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import inf
from pathlib import Path

from dpo.base.limits import raise_limit
from dpo.base.processes import find_process
from dpo.base.workers import end_with, signal_name
from dpo.terminal.console import say
from launch.output import Output
from launch.stops import Signals

_POLL_SECONDS = 0.2
_REPEAT_SECONDS = 1.0
"""SIGUSR2 is sent again this often: a rank that is still importing ignores it."""
_PEER_SECONDS = 30.0
"""How long a node waits, after another node has failed, for its own ranks to notice and end."""
_TERM_SECONDS = 10.0
"""Time between SIGTERM to torchrun and SIGKILL to all its descendants; a tenth of the time to save if that is
shorter."""
_KEPT_LINES = 2000
_TORCHRUN = "torch.distributed.run"


@dataclass(frozen=True)
class Ended:
    """The result of torchrun."""

    exit_code: int
    stderr: str
    """The last lines of torchrun and its ranks, with their stdout where the log of a job has both; empty if stderr is a
    terminal.
    """


@dataclass(frozen=True)
class Ending:
    """What a signal that ends the job means to the ranks."""

    words: str
    """For the user."""
    seconds: float = inf
    """How long they may go on, where that is less than the job has."""


@dataclass(frozen=True)
class Watch:
    """What is asked, about once per second, while torchrun runs."""

    peer_failed: Callable[[], bool]
    """Returns whether another node's torchrun has failed."""
    ending: Callable[[], Ending]
    """Returns what a signal that ends the job means now."""


def run(words: Sequence[str], env: Mapping[str, str], noted: Signals, grace: float, watch: Watch, later: Path) -> Ended:
    """Runs torchrun to its end.

    Args:
        words: the command line of torchrun.
        env: its environment.
        noted: the signals of this process.
        grace: seconds that the ranks have to exit after a signal that does not end the job; then they are killed.
        watch: what else is looked at.
        later: the file for output that is too much for the log (`launch.output`).
    """
    stdout, stderr = _streams()
    parent = os.getpid()
    process = subprocess.Popen(
        words,
        env=dict(env),
        stdout=stdout,
        stderr=stderr,
        text=True,
        errors="replace",
        process_group=0,
        preexec_fn=lambda: _prepare(parent),
    )
    kept, output = deque[str](maxlen=_KEPT_LINES), Output(later)
    source = process.stdout or process.stderr or nullcontext(())
    copier = threading.Thread(target=_copy, args=(source, kept, output), daemon=True)
    copier.start()
    try:
        _wait(process, noted, grace, watch)
    finally:
        _end(process, _TERM_SECONDS)  # does nothing unless an exception ended the wait
        copier.join(timeout=5)  # a process that a rank left behind may keep the pipe open
        output.close()
    return Ended(process.returncode, "".join(kept))


def _streams() -> tuple[int | None, int | None]:
    """Returns where stdout and stderr of torchrun and its ranks go; None: where this process's go.

    The ranks write to a terminal directly, for their progress bar; their lines are then not kept. Else stderr goes
    through a pipe, and stdout too where both are one file, the log of a job, which is bounded.
    """
    if sys.stderr.isatty():
        return None, None
    is_one_log = os.path.sameopenfile(1, 2)
    return (subprocess.PIPE, subprocess.STDOUT) if is_one_log else (None, subprocess.PIPE)


def _prepare(parent: int) -> None:
    """Ignores SIGUSR2, and raises the limit of open file descriptors: the torchrun of the first node holds a connection
    to every rank. Has torchrun end its ranks where this process is killed. Runs in the child before exec; torchrun
    inherits all of it, the ranks all but the last.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    raise_limit()
    end_with(parent, signal.SIGTERM)


def _copy(source: AbstractContextManager[Iterable[str]], kept: deque[str], output: Output) -> None:
    """Prints and keeps all lines of torchrun. Must not stop reading, since the ranks block once the pipe is full."""
    with source as lines:
        for line in lines:
            kept.append(line)
            output.write(line)


def _wait(process: subprocess.Popen[str], noted: Signals, grace: float, watch: Watch) -> None:
    """Waits until torchrun ends: by itself, some time after a signal, or after the failure of another node."""
    peer_deadline, repeat_at, is_told = inf, 0.0, False
    while process.poll() is None:
        now = time.monotonic()
        if now >= repeat_at:
            repeat_at = now + _REPEAT_SECONDS
            if noted.stop_since is not None:  # before `look`, which may take most of the time that SLURM leaves
                send(signal.SIGUSR2, children(torchrun_of(process.pid)))
            noted.look()
            if peer_deadline == inf and watch.peer_failed():
                peer_deadline = now + _PEER_SECONDS
        if noted.ended and not is_told:
            is_told = True
            _begin_to_end(noted, watch.ending())
        if now >= min(peer_deadline, noted.deadline(grace)):
            _end(process, min(_TERM_SECONDS, noted.seconds(grace) / 10))
        time.sleep(_POLL_SECONDS)


def _begin_to_end(noted: Signals, ending: Ending) -> None:
    """Tells that the job ends; hurries where there is little to save."""
    say(f"{signal_name(noted.ended_by)}: {ending.words}")
    noted.hurry(ending.seconds)


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
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return {pid: found.parent for pid in pids if (found := find_process(pid))}


def send(number: int, pids: Sequence[int]) -> None:
    """Sends a signal to processes. Processes that have ended meanwhile are skipped."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
