"""The torchrun of one node, as a person would type it, and the environment that it needs."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FIRST_PORT, _NUM_PORTS = 10000, 20000  # below the ports that Linux hands out by itself, from 32768


@dataclass(frozen=True)
class Program:
    """What every rank runs."""

    module: str
    """dpo.train or dpo.reference."""
    words: tuple[str, ...]
    """Its command line."""
    ranks_per_node: int
    env: tuple[tuple[str, str], ...] = ()
    """Environment variables of --env."""


@dataclass(frozen=True)
class Place:
    """Where in a job a node stands."""

    node: int
    hosts: tuple[str, ...]
    """The names of all nodes; the first one's torchrun is the meeting point."""
    port: int


def master_port(job_id: str) -> int:
    """The port at which the nodes of a job meet: jobs that share a node have different ids, so different ports."""
    return _FIRST_PORT + int(job_id) % _NUM_PORTS


def rendezvous(place: Place) -> list[str]:
    """torchrun's flags that bring the nodes together.

    Static: with torchrun's c10d rank 0 may come to lie on another node than the first.
    """
    if len(place.hosts) == 1:
        return ["--standalone"]
    address = ["--master-addr", place.hosts[0], "--master-port", str(place.port)]
    return ["--nnodes", str(len(place.hosts)), "--node-rank", str(place.node), *address]


def command(program: Program, place: Place, log_dir: Path | None = None, python: str = sys.executable) -> list[str]:
    """The words of a node's torchrun; each rank that raises leaves an error.json under `log_dir`."""
    logs = ["--log-dir", str(log_dir)] if log_dir else []
    ranks = ["--nproc-per-node", str(program.ranks_per_node)]
    torchrun = [python, "-m", "torch.distributed.run", *rendezvous(place), *ranks, *logs]
    return [*torchrun, "-m", program.module, *program.words]


def line(program: Program, nodes: int, python: str = sys.executable) -> str:
    """The line that a person would type on each node, with names for what only the job knows."""
    place = Place(0, ("FIRST_NODE",) * nodes, 0)
    words = command(program, place, python=python)
    for flag, name in (("--node-rank", "THIS_NODE"), ("--master-port", "PORT")):
        if flag in words:
            words[words.index(flag) + 1] = name
    return " ".join([f"{name}={shlex.quote(value)}" for name, value in program.env] + [shlex.join(words)])


def environment(program: Program, files: Mapping[str, Path]) -> dict[str, str]:
    """This process's environment with what torchrun and the ranks need more; `files` by the variable that names them.

    What the user set stays.
    """
    env = {**os.environ, **dict(program.env), **{name: str(path) for name, path in files.items()}}
    env.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus() // program.ranks_per_node)))
    return env


def num_cpus() -> int:
    """The CPUs that this job may use on this node."""
    return int(os.environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
