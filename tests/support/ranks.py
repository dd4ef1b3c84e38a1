"""Real processes for distributed tests: started once a session, and started again after a failure."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.support.processes import start
from tests.surroundings import spare_the_collector, spare_the_disk

SECONDS = 240
"""How long a call may take before its ranks are killed."""


class Ranks:
    """Runs functions on 1 to many processes, each with torchrun's environment and a fresh process group to open."""

    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection]] = []

    def __call__(self, size: int, work: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`work(*args, **kwargs)` on `size` ranks at once; its results by rank. `work` must be importable by name.

        Raises AssertionError with the first failing rank's traceback; the processes are then started afresh.
        """
        while len(self.workers) < size:
            self.workers.append(_start())
        port = _free_port()
        for rank, (_, pipe) in enumerate(self.workers[:size]):
            pipe.send((_environment(rank, size, port), work, args, kwargs))
        answers = [_answer(pipe) for _, pipe in self.workers[:size]]
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    def close(self) -> None:
        """Ends the processes."""
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers.clear()


def _start() -> tuple[Any, Connection]:
    ours, theirs = multiprocessing.Pipe()
    return start(_serve, theirs), ours


def _answer(pipe: Connection) -> tuple[bool, Any]:
    """(True, result) or (False, traceback); a rank that waits for a dead one is not waited for."""
    try:
        return pipe.recv() if pipe.poll(SECONDS) else (False, f"no answer in {SECONDS} seconds")
    except EOFError:
        return False, "the process died"


def _serve(pipe: Connection) -> None:
    import torch

    import dpo.train.program  # noqa: F401  (most of what runs here needs it)

    torch.set_num_threads(1)
    spare_the_disk()
    spare_the_collector()
    plain = dict(os.environ)
    while True:
        environment, work, args, kwargs = pipe.recv()
        os.environ.clear()
        os.environ.update(plain | environment)
        try:
            pipe.send((True, work(*args, **kwargs)))
        except BaseException:  # whatever it is, the test must hear of it
            pipe.send((False, traceback.format_exc()))
            os._exit(1)  # its peers may wait for it in a collective: they must see it die


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    copied = {name: os.environ[name] for name in ("DPO_CACHE", "HF_HOME") if name in os.environ}
    return copied | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
