"""Processes of their own that need not import torch, which takes longer than most tests: forked from one that has."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def start(work: Callable[..., None], *args: Any) -> BaseProcess:
    """A new process in which `work(*args)` runs. `work` must be importable by name.

    The first call of a session starts the process from which all are forked. It imports the trainer and does nothing
    else, so that no thread, no process group and no autograd engine is inherited.
    """
    multiprocessing.set_forkserver_preload(["dpo.train.program"])
    process = multiprocessing.get_context("forkserver").Process(target=work, args=args, daemon=False)
    process.start()
    return process


def start_program(code: str, words: list[str], stderr: Path, **names: Any) -> BaseProcess:
    """`python -c CODE WORDS` in a session of its own, with this process's environment and its stderr in a file.
    `names` are global names of the code.
    """
    return start(_run_program, code, words, stderr, dict(os.environ), names)


def _run_program(code: str, words: list[str], stderr: Path, environment: dict[str, str], names: dict[str, Any]) -> None:
    import torch  # here: a session in which nothing is started need not import it

    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, also where the tests run under nohup or by a &
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *words]
    torch.set_num_threads(1)  # as in the tests: equal to the last bit is promised for as many threads
    try:
        exec(compile(code, "<program>", "exec"), names | {"__name__": "__main__"})
    except SystemExit:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # multiprocessing flushes it, and fails where its reader is gone
        raise
