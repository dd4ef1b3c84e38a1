"""Work in forked processes, which end with the process that started them and never leave it waiting.

    this process ── fork ──> worker: work(report)
                 <── pipe ── counts of what is done; then None, or the exception that ended the work

The only forks of the package that go on to run its code are made here; `_undisturbed` says why a worker must not
collect inherited garbage. A `multiprocessing.Pool`, which `Dataset.map(num_proc=...)` starts, is not used because it
can wait for ever: a worker that is killed while it waits for work keeps the lock that `Pool.terminate` then asks for.
"""

import ctypes
import gc
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

Report = Callable[[int], object]
"""Takes the number of units of work done since it was called last."""
Work = Callable[[Report], None]

_FORK = get_context("fork")
_PRCTL, _PR_SET_PDEATHSIG = ctypes.CDLL(None).prctl, 1  # linux/prctl.h


class WorkerDied(RuntimeError):
    """A worker ended before its work did, without an exception.

    Attributes:
        exit_code: the worker's exit code, or the negative number of the signal that ended it
    """

    def __init__(self, exit_code: int):
        super().__init__(f"a worker ended with exit code {exit_code}")
        self.exit_code = exit_code


def signal_name(number: int) -> str:
    """Returns the name of a signal, SIGKILL for 9; `signal 35` for a real-time signal, which has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def run_in_workers(works: Sequence[Work], report: Report) -> None:
    """Runs each of `works` in a process forked from this one and returns once all are done.

    No worker outlives the call, however it ends: workers are killed after a failure and after Ctrl-C, which they ignore
    themselves, and the kernel kills them where this process dies.

    Args:
        works: called in the workers, each with a `report` of its own
        report: called in this process with each count that a worker reports

    Raises:
        WorkerDied: a worker ended without an exception, for example by the kernel for want of memory
        Exception: the first that any of `works` raised, with the worker's traceback as a note; a RuntimeError of the
            same text in place of one that cannot be pickled
    """
    workers: list[tuple[ForkProcess, Connection]] = []
    try:
        with _undisturbed():
            workers += map(_start, works)
        _follow({pipe: worker for worker, pipe in workers}, report)
    finally:
        for worker, pipe in workers:
            worker.kill()
            worker.join()
            pipe.close()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps the garbage collector and Ctrl-C out of workers that are forked inside, until `_work` has set up both.

    A worker must not collect the garbage that it inherits. The destructor of a process group, for one, waits for the
    group's threads, and a fork does not copy threads: such a worker hangs or dies of SIGSEGV. So the collector is off
    at the fork, and the worker freezes all that it inherits before it turns it on. Freezing is left to the worker
    because `gc.unfreeze` here would also unfreeze objects that other code froze.

    Source: https://docs.python.org/3/library/gc.html#gc.freeze
    """
    collects = gc.isenabled()
    gc.disable()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if collects:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)  # last: a Ctrl-C that came meanwhile is raised here


def _start(work: Work) -> tuple[ForkProcess, Connection]:
    """Forks a worker; returns it and the pipe that it writes to."""
    ours, theirs = _FORK.Pipe(duplex=False)
    worker = _FORK.Process(target=_work, args=(work, theirs, os.getpid()), daemon=True)
    worker.start()
    theirs.close()  # the worker holds the only copy, so the pipe ends when the worker does
    return worker, ours


def _follow(workers: dict[Connection, ForkProcess], report: Report) -> None:
    """Calls `report` with the counts of the workers until all have ended their work."""
    while workers:
        for pipe in wait(list(workers)):
            assert isinstance(pipe, Connection)
            message = _receive(pipe, workers[pipe])
            if isinstance(message, Exception):
                raise message
            if message is None:
                workers.pop(pipe)
            else:
                report(message)


def _receive(pipe: Connection, worker: ForkProcess) -> int | Exception | None:
    """Returns the next message of a worker: a count, or its end."""
    try:
        message: int | Exception | None = pipe.recv()
    except (EOFError, OSError):  # it died, perhaps in the middle of a message
        worker.join()
        raise WorkerDied(worker.exitcode or 0) from None
    return message


# --- in the worker ----------------------------------------------------------------------------------------------------


def _work(work: Work, pipe: Connection, parent: int) -> None:
    """Runs `work` in a worker and sends its counts and its end."""
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent alone answers it
    end_with(parent)
    end: Exception | None = None
    try:
        work(pipe.send)
    except Exception as failure:
        end = _picklable(failure)
        end.add_note(f"Raised in a worker:\n{traceback.format_exc()}")
    pipe.send(end)


def _picklable(failure: Exception) -> Exception:
    """Returns the exception, or a RuntimeError of the same text where pickling it does not give it back."""
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:  # whatever the exception's own methods raise
        return RuntimeError(f"{type(failure).__name__}: {failure}")
    return failure


def end_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Asks the kernel to send this process a signal when the parent ends; ends it now if that has happened already.

    The kernel looks at the *thread* that started this process, which must therefore wait for it.

    Source: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
    """
    if _PRCTL(_PR_SET_PDEATHSIG, ctypes.c_ulong(number)) != 0 or os.getppid() != parent:
        os._exit(1)
