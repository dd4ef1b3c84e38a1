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


def ask_site(partition: str | None, with_gpus: bool) -> Site:
    """Returns the facts of a partition, as far as SLURM's commands answer.

    Args:
        partition: its name, or several separated by commas, of which the first is asked; None: the default partition.
        with_gpus: whether only nodes with GPUs are looked at.
    """
    found = _partition(partition and partition.split(",")[0])
    name = found.get("PartitionName")
    nodes = _nodes(name, with_gpus) if name else []
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


def _nodes(partition: str, with_gpus: bool) -> list[tuple[int, int]]:
    """Returns (CPUs, MiB) of the nodes of a partition."""
    shown = _output("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%c|%m|%G")
    nodes = re.findall(r"^(\d+)\|(\d+)\|(.*)$", shown, re.MULTILINE)
    return [(int(cpus), int(memory)) for cpus, memory, gres in nodes if "gpu" in gres or not with_gpus]


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
