"""Jobs of `python -m launch.submit` on the cluster: submitted, asked about, waited for."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.run_folder.files import read_metrics

ON_GPUS = (sys.executable, "-m", "launch.submit", "--nodes", "2", "--gpus-per-node", "2")
ON_CPUS = "--env CUDA_VISIBLE_DEVICES="
"""What lets a job train on CPUs though it asked for the cluster's GPUs, which torch cannot use."""
SUBMIT = (*ON_GPUS, *ON_CPUS.split())
SECONDS = 120
"""How long anything may take that is waited for."""


@dataclass(frozen=True)
class Job:
    """A job that was submitted, and the run folder in which it works."""

    id: str
    run_dir: Path

    @property
    def log(self) -> str:
        """What the tasks of all nodes said, the first node's first, from the job's first start on."""
        return "".join(path.read_text() for path in sorted((self.run_dir / "jobs").glob(f"{self.id}_*_log.out")))

    @property
    def state(self) -> str:
        """RUNNING, COMPLETED, ..."""
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        """How often SLURM has started it again."""
        return int(self.field("Restarts"))

    def field(self, name: str) -> str:
        """What SLURM shows of it under this name."""
        return re.findall(rf"\b{name}=(\S+)", command("scontrol", "show", "job", self.id))[0]


def submit(config: Path, *flags: str) -> Job:
    """Submits a run of two nodes of two ranks."""
    printed = command(*SUBMIT, "--config", str(config), *flags)
    told = dict(re.findall(r"^(\w+) +(\S.*)$", printed, re.MULTILINE))
    return Job(told["job"], Path(told["run"]))


def command(*words: str) -> str:
    """What a command that must succeed prints."""
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def wait_for(job: Job, what: str, is_so: Callable[[], bool]) -> None:
    """Returns as soon as `is_so()`; fails with the job's log where that takes too long."""
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end, f"waited in vain until {what}; the job is {job.state}:\n{job.log}"
        time.sleep(0.1)


def wait_for_steps(job: Job, more: int) -> int:
    """Returns when the run is `more` steps further; the step it has come to."""
    first = last_step(job.run_dir)
    wait_for(job, f"step {first + more} is done", lambda: last_step(job.run_dir) >= first + more)
    return last_step(job.run_dir)


def last_step(run_dir: Path) -> int:
    """The last step that a run's metrics have."""
    return max((int(line["step"]) for line in read_metrics(run_dir)), default=0)


def endings(run_dir: Path) -> list[tuple[str, str]]:
    """(state, message) of every time that a job ended in a run folder, the oldest first."""
    histories = sorted((run_dir / "jobs").glob("*/history.jsonl"))
    lines = [json.loads(line) for path in histories for line in path.read_text().splitlines()]
    return [(line["state"], line["message"]) for line in lines]


def rank_processes() -> dict[int, tuple[int, Sequence[str]]]:
    """Rank -> (process, NAME=VALUE of its environment), of all ranks that run in this cluster."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            environment = (folder / "environ").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        rank = next((entry.removeprefix("RANK=") for entry in environment if entry.startswith("RANK=")), None)
        if rank is not None and "dpo.train" in words:
            found[int(rank)] = int(folder.name), environment
    return found


def resumed_from(job: Job) -> list[int]:
    """The steps of the checkpoints that it has gone on from."""
    return [int(step) for step in re.findall(r"^resumes from .*step-(\d+)$", job.log, re.MULTILINE)]
