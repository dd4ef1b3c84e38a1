"""Worlds of ranks to be disturbed: each rank is forked from a process that has imported everything, so that a start
costs no imports. For the storms of this folder and of tests/bench; nothing here is collected by pytest.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dpo.config import Config
from dpo.run_folder.files import METRICS, read_metrics
from dpo.train import loop
from tests.support.processes import start
from tests.surroundings import spare_the_disk

SECONDS = 300
"""How long a world may do nothing before the storm gives up."""


def nothing(rank: int) -> None:
    """Arranges nothing."""


@dataclass(frozen=True)
class World:
    """The ranks of one start of a run."""

    ranks: list[BaseProcess]
    stderr: Path

    @property
    def alive(self) -> list[BaseProcess]:
        """Returns the ranks that still run."""
        return [rank for rank in self.ranks if rank.is_alive()]

    def kill(self, rank: int) -> None:
        """Kills a rank by SIGKILL and then, as torchrun does, ends the others."""
        self.ranks[rank].kill()
        self.ranks[rank].join()
        self.end()

    def end(self) -> None:
        """Ends the ranks that still run: SIGTERM, and SIGKILL where that is not enough."""
        for process in self.alive:
            process.terminate()
        for process in self.ranks:
            process.join(5)
            process.kill()
            process.join()

    def wait(self) -> list[int]:
        """Waits until all ranks have ended; their exit codes."""
        for process in self.ranks:
            process.join(SECONDS)
            assert not process.is_alive(), f"a rank hangs: {self.stderr.read_text()[-3000:]}"
        return [int(process.exitcode or 0) for process in self.ranks]


def start_world(config: Config, size: int = 2, arrange: Callable[[int], None] = nothing) -> World:
    """Starts a run on `size` ranks, in sessions of their own; their stderr is appended to a file beside the run folder.

    Args:
        config: the run's.
        size: the number of ranks.
        arrange: called in each rank with its number before the run begins; importable by name.
    """
    stderr = Path(str(config.train.run_dir)).with_suffix(".stderr")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    numbers = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    common = {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
    envs = [dict(os.environ) | common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(size)]
    return World([start(_run_rank, config, env, stderr, arrange) for env in envs], stderr)


def _run_rank(config: Config, env: dict[str, str], stderr: Path, arrange: Callable[[int], None]) -> None:
    import torch  # here and below: the storm itself need not import them

    from dpo.distributed.program import exit_program
    from dpo.run_folder.advice import AFTER_TRAINING
    from dpo.train.program import run_training

    os.setsid()
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    spare_the_disk()
    arrange(int(env["RANK"]))
    exit_program(lambda: run_training(config), AFTER_TRAINING)


def dies_in_step_4(rank: int) -> None:
    """Has rank 1 kill itself, as `kill -9` would, in the middle of a run."""
    step_of_a_run = loop._step

    def die(run: Any, number: int, *others: Any) -> Any:
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return step_of_a_run(run, number, *others)

    loop._step = die if rank == 1 else step_of_a_run


def last_step(run_dir: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 before the first. Reads its end alone."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            lines = file.read().split(b"\n")[1:-1] or [b""]
    except FileNotFoundError:
        return 0
    found = lines[-1].partition(b'"step": ')[2].split(b",")[0].rstrip(b"}")
    return int(found) if found.isdigit() else len(read_metrics(run_dir))


def wait_for_step(world: World, run_dir: Path, step: int) -> bool:
    """Waits until the run has made a step; whether it did before a rank ended."""
    end = time.monotonic() + SECONDS
    while last_step(run_dir) < step:
        if len(world.alive) < len(world.ranks):
            return last_step(run_dir) >= step
        assert time.monotonic() < end, f"step {step} never comes: {world.stderr.read_text()[-3000:]}"
        time.sleep(0.002)
    return True
