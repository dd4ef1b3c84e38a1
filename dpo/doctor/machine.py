"""Devices with their free memory, versions of libraries, and what training on a GPU needs beside them."""

import importlib.metadata
import os
import platform
import re
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo.distributed.world import World
from dpo.doctor.parts import Finding, Part, Subject, by_host
from dpo.doctor.words import counted, gib
from dpo.machine.facts import Facts, gather_facts, host_memory
from dpo.machine.toolchain import find_problems, find_warnings, needs_of

BUSY = 0.9
"""Share of a GPU's memory that is free at least where no other process uses it."""


# --- devices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Devices:
    """A rank's device."""

    host: str
    name: str
    free: int
    total: int
    """Bytes of a GPU's memory; of a CPU those of the host, which its ranks share."""
    threads: int | None
    """Of a CPU, that torch computes with on this rank."""


def measure_devices(subject: Subject, world: World) -> Devices:
    """This rank's device."""
    host = socket.gethostname()
    if world.device.type == "cpu":
        return Devices(host, cpu_name(), *host_memory(), torch.get_num_threads())
    found = torch.cuda.get_device_properties(world.device)
    free, total = torch.cuda.mem_get_info(world.device)
    return Devices(host, f"{found.name} (capability {found.major}.{found.minor})", free, total, None)


def cpu_name() -> str:
    """The processor's name and the number of cores that this process may use."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {counted(len(os.sched_getaffinity(0)), 'core')}"


def describe_devices(subject: Subject, found: Sequence[Devices]) -> Finding:
    """A line a kind of device, with the least free memory among them."""
    kinds = Counter((one.name, one.threads) for one in found)
    lines, advice = [], []
    for (name, threads), count in kinds.items():
        least = min((one for one in found if one.name == name), key=lambda one: one.free)
        having = f"; {counted(threads, 'thread')} a rank" if threads is not None else ""
        lines.append(f"{count} x {name}{having}; {gib(least.free)} of {gib(least.total)} GiB free")
        if threads is None and least.free < BUSY * least.total:
            used = f"{gib(least.total - least.free)} GiB of rank {found.index(least)}'s GPU are in use"
            advice.append(f"{used} (nvidia-smi says by whom)")
    if len(kinds) > 1:
        advice.append("the ranks' devices differ, and all wait for the slowest")
    return Finding(DEVICES.name, tuple(lines), advice=tuple(advice))


DEVICES = Part("devices", measure_devices, describe_devices, remedy="GPUs that nvidia-smi lists without an error")


# --- versions --------------------------------------------------------------------------------------------------------

PACKAGES = ("torch", "transformers", "triton")


def measure_versions(subject: Subject, world: World) -> dict[str, str]:
    """Versions by name, and the host's name as "host"."""
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    if world.device.type == "cuda":
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions | {"host": socket.gethostname()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def describe_versions(subject: Subject, found: Sequence[dict[str, str]]) -> Finding:
    """Those of rank 0; that another rank has others is a problem."""
    first = {name: version for name, version in found[0].items() if name != "host"}
    problems = []
    for other in found[1:]:
        for name in first:
            if other.get(name) != first[name]:
                what = f"{name} is {other.get(name)} on {other['host']} and {first[name]} on {found[0]['host']}"
                problems.append(f"{what}; what helps: the same environment on every node")
    line = ", ".join(f"{name} {version}" for name, version in first.items())
    return Finding(VERSIONS.name, (line,), problems=tuple(dict.fromkeys(problems)))


VERSIONS = Part("versions", measure_versions, describe_versions, remedy="pip install --force-reinstall of this project")


# --- toolchain -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toolchain:
    """A rank's facts, and what follows for the run."""

    facts: Facts
    problems: list[str]
    warnings: list[str]


def measure_toolchain(subject: Subject, world: World) -> Toolchain:
    """What the training program looks at before it reads weights."""
    facts = gather_facts(world.device)
    needs = needs_of(subject.compute_dtype(world.device), subject.models)
    return Toolchain(facts, find_problems(facts, needs), find_warnings(facts, needs))


def describe_toolchain(subject: Subject, found: Sequence[Toolchain]) -> Finding:
    """Rank 0's driver and compiler, the problems of all."""
    facts = found[0].facts
    driver = f"NVIDIA driver {facts.driver}" if facts.driver else "no NVIDIA driver"
    header = "Python.h" if facts.has_python_h else "no Python.h"
    needed = "" if facts.gpu or facts.driver else " (only GPUs need them)"
    line = f"{driver}, C compiler {facts.compiler or 'none'}, {header}{needed}"
    hosts = [one.facts.host for one in found]
    problems = by_host(hosts, [[p.replace("; valid: ", "; what helps: ") for p in one.problems] for one in found])
    warnings = tuple(dict.fromkeys(line for one in found for line in one.warnings))
    return Finding(TOOLCHAIN.name, (line,), problems=problems, advice=warnings)


TOOLCHAIN = Part(
    "toolchain",
    measure_toolchain,
    describe_toolchain,
    remedy="GPUs that nvidia-smi lists without an error; TMPDIR, a folder to write in",
)
