"""The parent of ranks: starts them with torchrun's API, passes on a stop, and prints the last line.

`start_processes` is the part of torchrun that starts processes. What torchrun puts around it serves several nodes and
restarts; a run on one node that resumes by the same command needs neither, and the 40 lines that torchrun prints after
a failure would stand below ours. Each rank gets the environment that torchrun gives, and a session of its own, so that
a terminal's Ctrl-C reaches the parent alone.

The ranks that a failed rank leaves behind are ended by SIGKILL: they take SIGTERM, torchrun's signal, as a request to
save, in a collective that never ends.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes
from torch.distributed.elastic.multiprocessing.api import RunProcsResult

from dpo.base.errors import UserError
from dpo.base.workers import signal_name
from dpo.command.blame import Failure, place_of_killed, read_error
from dpo.command.exits import EXIT_CODES, tell_error, tell_stop
from dpo.command.status import GPUS_ASKED, STATUS_FILE, read_status
from dpo.front.ending import End, Verdict, is_time_to_kill, judge
from dpo.front.names import Command
from dpo.front.ranks import Wanted, check_host, number_of_ranks
from dpo.front.stops import held_back, noted_stops
from dpo.machine.facts import HIDDEN, find_driver, host_memory
from dpo.machine.job import why_no_gpu
from dpo.terminal.console import log_alone, open_log, say

HOST = "127.0.0.1"
_POLL_SECONDS = 0.1
_KILL_SECONDS = 30


def run_ranks(command: Command, words: tuple[str, ...], wanted: Wanted, log: Path | None) -> int:
    """Runs a program on ranks of this machine to its end, and returns the exit code of `dpo.front.ending`.

    Args:
        command: the program.
        words: its command line.
        wanted: the ranks that the user asked for.
        log: the log of rank 0, which gets the last line, and the lines of signals; None: the program has none.

    Raises UserError where fewer GPUs are visible than asked for.
    """
    size = number_of_ranks(wanted, *_visible_gpus())
    if wanted.ranks:
        check_host(size, host_memory()[0])
    with noted_stops() as stops, TemporaryDirectory(prefix="dpo-") as folder:
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # alive until all ranks have ended
        status = Path(os.environ.get(STATUS_FILE) or Path(folder, "status.json"))
        status.unlink(missing_ok=True)
        common = {STATUS_FILE: str(status)} | _devices(wanted)
        envs = environments(size, store.port, common)
        context = _start(command.module, words, envs, folder)
        verdict = judge(_watch(context, stops, lambda: read_status(status)), command)
        # A start that is refused writes nothing: it makes no folder, and the log may be that of another start.
        if log is not None and log.is_file() and verdict.exit_code != EXIT_CODES[UserError]:
            open_log(log)
        _tell(verdict)
        return verdict.exit_code


def _tell(verdict: Verdict) -> None:
    """Prints the last line, unless the ranks have printed it; adds it to the log."""
    if verdict.stop is not None:
        tell_stop(verdict.stop)
    elif verdict.error is not None and not verdict.is_printed:
        tell_error(verdict.error)
    elif verdict.error is not None and not verdict.is_logged:
        log_alone(f"error: {verdict.error}")


def _visible_gpus() -> tuple[int, str]:
    """Returns the number of GPUs that torch finds, and why it finds none. Does not start CUDA in this process."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN
    why_none = (
        "CUDA_VISIBLE_DEVICES hides all GPUs"
        if is_hidden
        else why_no_gpu(torch.__version__, torch.version.cuda, find_driver())
    )
    return (torch.cuda.device_count() if torch.cuda.is_available() else 0), why_none


def _devices(wanted: Wanted) -> dict[str, str]:
    """Returns the variables that tell the ranks their kind of device."""
    if wanted.ranks:
        return {"CUDA_VISIBLE_DEVICES": ""}
    return {GPUS_ASKED: str(wanted.gpus)} if wanted.gpus else {}


def environments(size: int, port: int, common: dict[str, str]) -> dict[int, dict[str, str]]:
    """Returns the environment variables of each rank beside those of this process: those of torchrun on one node.

    Args:
        size: the number of ranks.
        port: of the store, which this process serves.
        common: further variables, for all ranks.
    """
    numbers = {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default"}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(size))
    place = {"MASTER_ADDR": HOST, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    attempt = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none"}
    nccl = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")}
    shared = numbers | sizes | place | attempt | nccl | _threads(size) | common
    return {rank: shared | dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank)) for rank in range(size)}


def _threads(size: int) -> dict[str, str]:
    """Returns OMP_NUM_THREADS for ranks that share the CPUs, unless the user has set it."""
    if size == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // size))}


def _start(module: str, words: tuple[str, ...], envs: dict[int, dict[str, str]], folder: str) -> PContext:
    """Starts the ranks with all signals that ask them to save held back."""
    logging.getLogger(PContext.__module__).setLevel(logging.CRITICAL)  # its words on ranks that ended
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the ranks inherit what is ignored of the others
    arguments = (*python_flags(), "-m", "dpo.front.rank", str(os.getpid()), module, *words)
    with held_back():
        return start_processes(
            "dpo", sys.executable, dict.fromkeys(envs, arguments), envs, DefaultLogsSpecs(log_dir=folder)
        )


def python_flags() -> list[str]:
    """Returns the flags of a rank's Python. Where `dpo` was not started as `python -m dpo`, no module of the current
    folder is imported, such as a dpo.py of the user.
    """
    return ["-u"] if sys.path[0] in ("", str(Path.cwd())) else ["-u", "-P"]


def _watch(context: PContext, stops: list[int], status: Callable[[], Mapping[str, object]]) -> End:
    """Waits until all ranks have ended or one has failed, and ends the others. At a first signal asks them to save;
    kills them where nothing can be saved.
    """
    is_asked = is_killed = False
    try:
        while not _is_over(codes := _exit_codes(context), len(context.pids())):
            if stops:
                now = status()
                if is_killed := is_time_to_kill(len(stops), now):
                    break
                if not is_asked:
                    (_ask if now["state"] == "training" else _wait)(context, stops[0])
                is_asked = True
            time.sleep(_POLL_SECONDS)
    finally:
        context.close(signal.SIGKILL, _KILL_SECONDS)  # does nothing where all have ended
    result = context.wait(timeout=0)
    assert result is not None, "all ranks have ended"
    return End(tuple(stops), status(), [] if is_killed else _failures(result, codes, context.error_files), is_killed)


def _exit_codes(context: PContext) -> dict[int, int]:
    """Returns the exit codes of the ranks that have ended, or the negative numbers of the signals that ended them. A
    look does not end what `PContext` watches, as its own `wait` does when a rank has failed.
    """
    looks = {rank: os.waitid(os.P_PID, pid, _LOOK) for rank, pid in context.pids().items()}
    return {
        rank: look.si_status if look.si_code == os.CLD_EXITED else -look.si_status
        for rank, look in looks.items()
        if look is not None
    }


_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def _is_over(codes: Mapping[int, int], size: int) -> bool:
    """Returns whether all ranks have ended, or one has failed, for which the others may wait for ever."""
    return len(codes) == size or any(codes.values())


def _ask(context: PContext, number: int) -> None:
    """Asks the ranks to save after the step that they are in."""
    for pid in context.pids().values():
        os.kill(pid, signal.SIGUSR2)  # also where a rank is done: its exit code is not taken yet
    say(f"{signal_name(number)}: saving after the current step; {_again(number)}")


def _wait(context: PContext, number: int) -> None:
    """Says that the ranks have saved what they had, and end by themselves once their trackers answer."""
    say(f"{signal_name(number)}: all is saved, the {len(context.pids())} ranks are ending; {_again(number)}")


def _again(number: int) -> str:
    return "Ctrl-C again ends the run at once" if number == signal.SIGINT else "a second signal ends the run at once"


def _failures(result: RunProcsResult, codes: Mapping[int, int], files: Mapping[int, str]) -> list[Failure]:
    """Returns the failures of the ranks: those with an error file, and those that ended by themselves.

    Args:
        result: how all ranks ended.
        codes: of the ranks that had ended when the others were killed.
        files: the error file of each rank; in `result` only those that are there.
    """
    host, failures = socket.gethostname(), []
    for rank, failure in result.failures.items():
        code = codes.get(rank, 0)
        if Path(failure.error_file).is_file():
            failures.append(read_error(Path(failure.error_file), host, rank))
        elif code < 0:
            how = f"killed by {signal_name(-code)}, without a Python exception"
            place = place_of_killed(Path(files[rank]))
            failures.append(Failure(host, rank, failure.timestamp, how, killed_by=-code, place=place))
        elif code:
            failures.append(Failure(host, rank, failure.timestamp, f"exit code {code}", exit_code=code))
    return failures
