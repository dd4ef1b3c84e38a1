"""The processes that tokenize, and the error line for a process that ends before its work."""

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dpo.base.errors import RunError
from dpo.base.workers import Report, Work, WorkerDied, run_in_workers, signal_name


def tokenize_in_workers(works: Sequence[Work], report: Report) -> None:
    """Runs each of `works` in a process of its own (`dpo.base.workers`) and returns once all are done.

    Raises:
        RunError: a process ended before its work did; the message says how, and on which host
        Exception: the first that any of `works` raised
    """
    try:
        with _serial_tokenizers():
            run_in_workers(works, report)
    except WorkerDied as failure:
        raise RunError(_message(_how(failure.exit_code), len(works))) from failure
    except MemoryError as failure:
        raise RunError(_message("found no more memory", len(works))) from failure


def _how(exit_code: int) -> str:
    """Returns how a process ended, by its exit code or the negative number of a signal."""
    if exit_code == -signal.SIGKILL:
        return "was killed, as the kernel does when the host's memory runs out"
    return f"ended early, by {signal_name(-exit_code) if exit_code < 0 else f'exit code {exit_code}'}"


def _message(how: str, num: int) -> str:
    """Returns the error line for one of `num` processes that ended before its work."""
    less = f"data.num_proc below {num} (1: the rank itself tokenizes)"
    return f"data.num_proc: one of {num} processes that tokenize on {socket.gethostname()} {how}; what helps: {less}"


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Keeps the tokenizers library from using threads in processes that are forked inside: a fork does not copy the
    threads of its pool, and each process already uses one core.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
