"""A run of `dpo.train` whose ranks count what they hold: `python -m tests.bench.rank_counts FOLDER --config FILE`.

After its third step, when a checkpoint has been written since the second, each rank writes FOLDER/rank-R.json: the open
file descriptors by kind, the most that it ever held, those of its parent (torchrun's agent), the seconds in which it
joined the group of each phase and made a further group with all other ranks waiting, and its private memory.
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dpo.distributed.collectives import all_gather
from dpo.distributed.program import run_program
from dpo.train import loop, program
from tests.bench.first_step import private_bytes

SECONDS_BETWEEN_COUNTS = 0.02
STEP = 3


@dataclass(frozen=True)
class Counts:
    """What one rank counted."""

    held: dict[str, int]
    """File descriptors by kind after step 3."""
    most: int
    """The most file descriptors at any time until then."""
    of_agent: dict[str, int]
    """File descriptors of torchrun's agent by kind after step 3."""
    private_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of a group's creation: `further`, on the wall's clock, with all ranks ready; `further_cpu`, of this
    process."""


def descriptors(pid: int | str) -> Counter[str]:
    """The open file descriptors of a process by kind: socket, pipe, anon_inode, file."""
    return Counter(_kind(path) for path in Path(f"/proc/{pid}/fd").iterdir())


def _kind(path: Path) -> str:
    try:
        target = str(path.readlink())
    except FileNotFoundError:  # closed meanwhile: the one that lists the folder is always such
        return "listing"
    return "file" if target.startswith("/") else target.split(":")[0]


class Most:
    """The most file descriptors that this process held, looked at in a thread."""

    def __init__(self) -> None:
        self.count = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.count = max(self.count, len(list(Path("/proc/self/fd").iterdir())) - 1)
            time.sleep(SECONDS_BETWEEN_COUNTS)


def seconds_of_a_group() -> dict[str, float]:
    """The seconds of a further gloo group of all ranks, and of its first collective."""
    all_gather(None)
    wall, cpu = time.perf_counter(), time.process_time()
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=10))
    made = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    all_gather(None)
    dist.destroy_process_group(group)
    return {"further": made, "further_cpu": cpu}


def counted(folder: Path, work: Callable[[], None]) -> None:
    """Runs `work`, a training program, and writes the counts after its third step."""
    most, step_of_a_run = Most(), loop._step

    def step(run: Any, number: int, *others: Any) -> Any:
        result = step_of_a_run(run, number, *others)
        if number == STEP:
            counts = Counts(
                dict(descriptors("self")), most.count, dict(descriptors(os.getppid())), private_bytes(),
                seconds_of_a_group(),
            )  # fmt: skip
            file = folder / f"rank-{run.world.rank}.json"
            file.write_text(json.dumps(asdict(counts)), encoding="utf-8")
        return result

    loop._step = step
    work()


def main() -> None:
    folder = Path(sys.argv.pop(1))
    counted(folder, program.main)


if __name__ == "__main__":
    code = run_program(main)
    sys.stdout.flush()
    os._exit(code)
