"""How a program ends: its exit code, the one line of its error, and its ranks together."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from dpo.base.errors import Preempted, RunError, UserError
from dpo.command.exits import (
    READER_GONE,
    exit_code_of,
    is_reader_gone,
    line_of,
    obey_quiet,
    show_any_text,
    tell_error,
    tell_stop,
    with_results_written,
)
from dpo.command.rank import is_main
from dpo.command.status import tell_end
from dpo.config import with_place
from dpo.distributed.collectives import all_gather
from dpo.distributed.startup import meet
from dpo.distributed.timeouts import leave_seconds
from dpo.machine.versions import untested_versions
from dpo.terminal.console import log_alone, say, warn
from dpo.watch.arrival import SaidByAnother
from dpo.watch.failures import has_lost_rank, met_alone, record_failure


def exit_program(main: Callable[[], None], after_stop: str = "") -> NoReturn:
    """Runs `main` and ends this process with the exit code of `run_program`, without the interpreter's own shutdown.

    In two of about sixty runs of two ranks on gloo, a thread of torch that still ran while Python shut down aborted the
    process ("terminate called without an active exception"), so that a finished run looked like a crash.
    """
    code = run_program(main, after_stop)
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed when the process was started
        with suppress(OSError):  # results are written already; a closed pipe or terminal takes no last words
            stream.flush()
    os._exit(code)


def run_program(main: Callable[[], None], after_stop: str = "") -> int:
    """Runs `main`, prints its error in one line, and returns the exit code of this rank (`command.exits.EXIT_CODES`).

    Rank 0 alone prints a UserError or RunError, which all ranks raise alike. A failure that one rank may meet alone
    (see `met_alone`) is printed by that rank, which ends at once: the other ranks may wait for it in a collective, and
    torchrun ends them when it sees the first rank end. Any other exception is a bug and propagates with its traceback.
    Every failure is also written to the file that torchrun names (`record_failure`).

    Args:
        after_stop: the advice that rank 0 prints after Ctrl-C; empty: none.

    Returns:
        0 if the program is done, or was asked to stop and has saved what it had; 1 for a failure while running; 2 for
        wrong input of the user; 130 for Ctrl-C; 141 where nobody reads its results any more.
    """
    is_first = is_main(os.environ)
    obey_quiet(sys.argv[1:])
    show_any_text()
    untested = untested_versions()
    if untested and is_first:
        warn(untested)
    try:
        with_results_written(main)
    except Preempted as stop:
        if is_first:
            (log_alone if tell_end(stop) else say)(str(stop))
        _leave_together()
        return exit_code_of(stop)
    except (UserError, RunError) as failure:
        placed = with_place(failure, sys.argv[1:]) if isinstance(failure, UserError) else failure
        record_failure(placed, line_of(placed))
        if is_first:
            tell_error(line_of(placed))
        if not _leave_together() and not is_first:  # rank 0 met no such error
            tell_error(line_of(placed))
        return exit_code_of(failure)
    except KeyboardInterrupt as stop:
        if is_first:
            tell_stop(after_stop)
        return exit_code_of(stop)
    except Exception as failure:
        if is_reader_gone(failure):
            return READER_GONE
        line = met_alone(failure)
        details = traceback.format_exc()
        record_failure(failure, line or details)
        if line is None:
            log_alone(details)
            raise
        if not isinstance(failure, SaidByAnother):
            tell_error(line)  # without waiting for other ranks
        return exit_code_of(failure)
    if is_first:
        tell_end(None)
    return 0


def _leave_together() -> bool:
    """Waits for all ranks, so that rank 0 has printed before any rank ends: torchrun ends all ranks as soon as it sees
    one that failed.

    Before there is a process group they meet in the store, which needs one connection per rank, where a group needs one
    per pair of ranks. Returns whether all ranks came.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        try:
            all_gather(None)  # over gloo; a barrier over NCCL would hang on the GPU if a rank is lost
        except RuntimeError as failure:
            if not has_lost_rank(failure):
                raise
            return False
        dist.destroy_process_group()
    elif size > 1:
        try:
            meet("leave", timedelta(seconds=leave_seconds(size)))
        except dist.DistError:
            return False
    return True
