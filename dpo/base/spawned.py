"""Runs a function in a process that is spawned for it: the caller's memory, threads and signal handlers stay out of it.

this process ── spawn ──> _serve: imports the function's module, calls it
             <── pipe ─── (result, None), or (None, failure)
"""

import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from dpo.base.errors import RunError, UserError, one_line
from dpo.base.workers import end_with

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


def in_own_process(work: Callable[[*Arguments], Result], *args: *Arguments) -> Result:
    """Runs `work`, which must be importable by name, in a process that is spawned for it, and returns its result.

    Raises:
        UserError: as `work` raised it.
        RunError: with one line that describes any other failure of `work` or of its process.
    """
    ours, theirs = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_serve, args=(theirs, os.getpid(), work, args), daemon=True)
    process.start()
    theirs.close()
    try:
        outcome: tuple[Result, BaseException | None] = ours.recv()
        process.kill()  # without the seconds that libraries take to end
        process.join()
    except EOFError:
        process.join()
        failed = RunError(f"its process ended without a result, with exit code {process.exitcode}")
        raise failed from None
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def _serve(pipe: Connection, parent: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Sends (result, None) or (None, failure) of `work` through the pipe. Ignores the signals that end or stop a run:
    the parent handles them. Ends with the process `parent`.
    """
    end_with(parent)
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        pipe.send((work(*args), None))
    except UserError as failure:
        pipe.send((None, failure))
    except Exception as failure:
        pipe.send((None, RunError(described(failure))))


def described(failure: Exception) -> str:
    """Returns an unexpected exception as one line, with the place that raised it."""
    frame = traceback.extract_tb(failure.__traceback__)[-1]
    place = f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} in {frame.name}"
    return f"{type(failure).__name__}: {one_line(str(failure))[:300]} ({place})"
