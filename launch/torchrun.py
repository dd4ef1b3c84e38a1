"""The torchrun command of one node, as a person would type it, and its environment."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FIRST_PORT, _NUM_PORTS = 10000, 20000  # below the ephemeral ports of Linux, which begin at 32768


@dataclass(frozen=True)
class Program:
    """The program that every rank runs."""

    module: str
    """dpo.train or dpo.reference."""
    words: tuple[str, ...]
    """The command line of the module."""
    ranks_per_node: int
    env: tuple[tuple[str, str], ...] = ()
    """Environment variables from --env: (name, value)."""
    interpreter: tuple[str, ...] = ()
    """The words that start Python in a container; empty: the interpreter of the launcher."""


@dataclass(frozen=True)
class Place:
    """The place of a node in a job."""

    node: int
    """Index of the node."""
    hosts: tuple[str, ...]
    """The host names of all nodes; the nodes meet at the first."""
    port: int
    """The port at which the nodes meet; unused with a single node."""


def master_port(job_id: str) -> int:
    """Returns the port at which the nodes of a job meet, derived from the job's id, so that jobs that share a node use
    different ports.
    """
    return _FIRST_PORT + int(job_id) % _NUM_PORTS


def rendezvous(place: Place) -> list[str]:
    """Returns the flags of torchrun with which the nodes meet. The rendezvous is static: with torchrun's c10d backend
    rank 0 may be on another node than the first.
    """
    if len(place.hosts) == 1:
        return ["--standalone"]
    address = ["--master-addr", place.hosts[0], "--master-port", str(place.port)]
    return ["--nnodes", str(len(place.hosts)), "--node-rank", str(place.node), *address]


def command(program: Program, place: Place, log_dir: Path | None = None, python: str = sys.executable) -> list[str]:
    """Returns the command line of a node's torchrun.

    Args:
        program: the program of the ranks.
        place: the place of the node among the nodes of the job.
        log_dir: torchrun's log folder, in which each rank that raises writes an error.json; None: its default.
        python: the interpreter, unless the program has one of its own.
    """
    logs = ["--log-dir", str(log_dir)] if log_dir else []
    ranks = ["--nproc-per-node", str(program.ranks_per_node)]
    torchrun = [*(program.interpreter or (python,)), "-m", "torch.distributed.run", *rendezvous(place), *ranks, *logs]
    return [*torchrun, "-m", program.module, *program.words]


def line(program: Program, nodes: int, python: str = sys.executable) -> str:
    """Returns the command that a person would type on each node, with placeholders for values that only a job knows.

    Args:
        program: the program of the ranks.
        nodes: number of nodes.
        python: the interpreter.
    """
    place = Place(0, ("FIRST_NODE",) * nodes, 0)
    words = command(program, place, python=python)
    for flag, name in (("--node-rank", "THIS_NODE"), ("--master-port", "PORT")):
        if flag in words:
            words[words.index(flag) + 1] = name
    return " ".join([f"{name}={shlex.quote(value)}" for name, value in program.env] + [shlex.join(words)])


def environment(program: Program, files: Mapping[str, Path]) -> dict[str, str]:
    """Returns the environment of torchrun: that of this process, the variables of --env, the variables that name
    `files`, and OMP_NUM_THREADS unless the user has set it.

    Args:
        program: the program of the ranks.
        files: environment variable -> the file whose path it holds.
    """
    env = {**os.environ, **dict(program.env), **{name: str(path) for name, path in files.items()}}
    env.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus() // program.ranks_per_node)))
    return env


def num_cpus() -> int:
    """Returns the number of CPUs that this job may use on this node."""
    return int(os.environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
