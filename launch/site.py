"""Asks SLURM what the nodes of a partition have and what it limits.

scontrol show config                           SelectTypeParameters = CR_CORE_MEMORY    memory is limited
scontrol show partition NAME --oneliner        GraceTime=0 MaxTime=2-00:00:00 Default=YES ...
sinfo --Node --partition=NAME -o '%c|%m|%G'    96|1031000|gpu:h100:8
"""

import re
import subprocess
from dataclasses import dataclass

from dpo.base.errors import UserError
from launch.durations import minutes_of

_PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class Site:
    """The facts of a partition; None where SLURM did not tell."""

    partition: str | None = None
    cpus: int | None = None
    """CPUs of its smallest node that has GPUs, or of its smallest node where none is needed."""
    memory_mib: int | None = None
    """Memory of that node for jobs, MiB."""
    limits_memory: bool | None = None
    """Whether a job gets only the memory that it asks for."""
    grace_seconds: int | None = None
    """Seconds that a preempted job has before it is killed."""
    max_minutes: int | None = None
    """The limit of --time."""


def ask_site(partition: str | None, gpus: str | None) -> Site:
    """Returns the facts of a partition, as far as SLURM's commands answer.

    Args:
        partition: its name, or several separated by commas, of which the first is asked; None: the default partition.
        gpus: GPUs per node, as N or TYPE:N: only nodes that have them are looked at; None: all nodes are.
    """
    found = _partition(partition and partition.split(",")[0])
    name = found.get("PartitionName")
    nodes = _nodes(name, gpus) if name else []
    select = re.search(r"^SelectTypeParameters\s*=\s*(\S+)", _output("scontrol", "show", "config"), re.MULTILINE)
    return Site(
        name,
        min((cpus for cpus, _ in nodes), default=None),
        min((memory for _, memory in nodes), default=None),
        "MEMORY" in select[1].upper() if select else None,
        int(found["GraceTime"]) if found.get("GraceTime", "").isdigit() else None,
        _minutes(found.get("MaxTime", "")),
    )


def _partition(name: str | None) -> dict[str, str]:
    """Returns what scontrol shows of a partition; empty where it shows none."""
    shown = _output("scontrol", "show", "partition", *([name] if name else []), "--oneliner")
    partitions = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown.splitlines()]
    named = [found for found in partitions if "PartitionName" in found]
    return next((found for found in named if name or found.get("Default") == "YES"), {})


def _nodes(partition: str, gpus: str | None) -> list[tuple[int, int]]:
    """Returns (CPUs, MiB) for jobs on the node with the fewest CPUs and on that with the least memory."""
    shown = _output("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%c|%m|%G|%n")
    nodes = re.findall(r"^(\d+)\|(\d+)\|(.*)\|(.*)$", shown, re.MULTILINE)
    fitting = [(int(cpus), int(memory), name) for cpus, memory, gres, name in nodes if gpus is None or _has(gres, gpus)]
    smallest = {min(fitting, key=lambda node: node[size]) for size in (0, 1)} if fitting else set()
    return [_for_jobs(*node) for node in smallest]


def _has(gres: str, gpus: str) -> bool:
    """Returns whether a node's generic resources, such as gpu:h100:8(S:0-1), have these GPUs."""
    kind, _, count = gpus.rpartition(":")
    found = re.findall(r"gpu(?::([A-Za-z][\w.-]*))?:(\d+)", gres)
    return sum(int(number) for name, number in found if not kind or name == kind) >= int(count)


def _for_jobs(cpus: int, memory: int, name: str) -> tuple[int, int]:
    """Returns the CPUs and MiB of a node without those that are reserved for the system."""
    node = _output("scontrol", "show", "node", name)
    shown = dict(re.findall(r"\b(CPUEfctv|CoreSpecCount|MemSpecLimit)=(\d+)", node))
    effective = int(shown.get("CPUEfctv", cpus - int(shown.get("CoreSpecCount", 0))))
    return effective, memory - int(shown.get("MemSpecLimit", 0))


def _minutes(text: str) -> int | None:
    try:
        return minutes_of(text)
    except UserError:  # UNLIMITED, or nothing
        return None


def _output(*words: str) -> str:
    """Returns what a command prints; nothing where it fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
