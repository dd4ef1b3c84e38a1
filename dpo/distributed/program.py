"""How a program ends: its exit code, the one line of its error, and its ranks together."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist

from dpo.base.command import exit_code_of, line_of, obey_quiet, tell_error
from dpo.base.console import say, warn
from dpo.base.errors import Preempted, RunError, UserError
from dpo.base.status import write_status
from dpo.config import with_place
from dpo.distributed.collectives import all_gather
from dpo.distributed.failures import met_alone, record_failure
from dpo.distributed.startup import join
from dpo.machine.versions import untested_versions


def exit_program(main: Callable[[], None]) -> NoReturn:
    """Ends this process with the exit code of `run_program`, past the interpreter's own way down.

    Seen twice in some sixty runs of two ranks on gloo: a thread of torch's that still runs while Python takes the
    process down aborts it ("terminate called without an active exception"), and what is done looks like a crash.
    """
    code = run_program(main)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # who read it has gone
            stream.flush()
    os._exit(code)


def run_program(main: Callable[[], None]) -> int:
    """Returns the exit code of a rank of a program, by `dpo.base.command.EXIT_CODES`, after it told its error.

    Rank 0 alone prints the error, in one line, but for what one rank meets alone (see `met_alone`): that rank prints it
    and ends at once, so that torchrun ends the others, which may wait for it in a collective. Any other exception is a
    bug, and its traceback is shown. Why a rank failed stands in the file that torchrun asks for.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    obey_quiet(sys.argv[1:])
    untested = untested_versions()
    if untested and is_main:
        warn(untested)
    try:
        main()
    except Preempted as stop:
        if is_main:  # torchrun ends with 0 both when a run is done and when it was stopped: the launcher reads which
            write_status({"state": "preempted", "step": stop.step})
            say(str(stop))
        _leave_together()
        return exit_code_of(stop)
    except (UserError, RunError) as failure:
        placed = with_place(failure, sys.argv[1:]) if isinstance(failure, UserError) else failure
        record_failure(placed, line_of(placed))
        if is_main:
            tell_error(line_of(placed))
        _leave_together()
        return exit_code_of(failure)
    except KeyboardInterrupt as stop:
        if is_main:
            what = "the same command goes on from the newest checkpoint, or starts again where there is none yet"
            print(f"stopped; {what}", file=sys.stderr, flush=True)
        return exit_code_of(stop)
    except Exception as failure:
        line = met_alone(failure)
        record_failure(failure, line or traceback.format_exc())
        if line is None:
            raise
        tell_error(line)  # it does not wait for the others
        return exit_code_of(failure)
    if is_main:
        write_status({"state": "done"})
    return 0


def _leave_together() -> None:
    """Lets rank 0 print before any rank ends: torchrun ends all others as soon as it sees the first."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        join(60)
    if dist.is_initialized():
        all_gather(None)  # over gloo: a barrier would wait on the GPU for a rank that is lost
        dist.destroy_process_group()
