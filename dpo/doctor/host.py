"""Devices with their free memory, versions of libraries, and the toolchain that training on a GPU needs."""

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
from dpo.doctor.parts import Finding, Part, Subject, by_host, with_remedy
from dpo.doctor.words import counted
from dpo.estimate.words import gib
from dpo.machine.driver import Problem
from dpo.machine.facts import Facts, gather_facts, host_memory
from dpo.machine.toolchain import find_problems, find_warnings, needs_of

BUSY = 0.9
"""Minimum share of a GPU's memory that is free where no other process uses it."""


# --- devices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Devices:
    """The device of a rank."""

    host: str
    name: str
    free: int
    total: int
    """Bytes of a GPU's memory; of a CPU the host's memory, which its ranks share."""
    threads: int | None
    """Threads with which torch computes on a CPU; None on a GPU."""
    hardware: str = "unknown"
    """The name of the GPU or of the processor alone."""
    capability: tuple[int, int] | None = None
    """Of a GPU."""


def measure_devices(subject: Subject, world: World) -> Devices:
    """Returns this rank's device."""
    host = socket.gethostname()
    if world.device.type == "cpu":
        name = f"{processor()}, {counted(len(os.sched_getaffinity(0)), 'core')}"
        return Devices(host, name, *host_memory(), torch.get_num_threads(), processor())
    gpu = torch.cuda.get_device_properties(world.device)
    free, total = torch.cuda.mem_get_info(world.device)
    capability = (gpu.major, gpu.minor)
    return Devices(host, f"{gpu.name} (capability {gpu.major}.{gpu.minor})", free, total, None, gpu.name, capability)


def processor() -> str:
    """Returns the processor's name."""
    name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return name[1] if name else platform.machine()


def describe_devices(subject: Subject, devices: Sequence[Devices]) -> Finding:
    """Returns one line per kind of device, with the least free memory among its devices."""
    kinds = Counter((device.name, device.threads) for device in devices)
    lines, advice = [], []
    for (name, threads), count in kinds.items():
        least = min((device for device in devices if device.name == name), key=lambda device: device.free)
        per_rank = f"; {counted(threads, 'thread')} per rank" if threads is not None else ""
        lines.append(f"{count} x {name}{per_rank}; {gib(least.free)} of {gib(least.total)} GiB free")
        if threads is None and least.free < BUSY * least.total:
            used = f"{gib(least.total - least.free)} GiB of rank {devices.index(least)}'s GPU are in use"
            advice.append(f"{used} (nvidia-smi lists the processes)")
    if len(kinds) > 1:
        advice.append("the ranks' devices differ, and all ranks wait for the slowest")
    return Finding(DEVICES.name, tuple(lines), advice=tuple(advice))


DEVICES = Part("devices", measure_devices, describe_devices, remedy="GPUs that nvidia-smi lists without an error")


# --- versions --------------------------------------------------------------------------------------------------------

PACKAGES = ("torch", "transformers", "triton")


def measure_versions(subject: Subject, world: World) -> dict[str, str]:
    """Returns versions by name, and the host's name by "host"."""
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    if world.device.type == "cuda":
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions | {"host": socket.gethostname()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def describe_versions(subject: Subject, versions: Sequence[dict[str, str]]) -> Finding:
    """Returns the versions of rank 0. A rank with other versions is a problem."""
    host, first = versions[0]["host"], {name: version for name, version in versions[0].items() if name != "host"}
    problems = []
    for other in versions[1:]:
        for name in first:
            if other.get(name) != first[name]:
                difference = f"{name} is {other.get(name)} on {other['host']} and {first[name]} on {host}"
                problems.append(with_remedy(difference, "the same environment on every node"))
    line = ", ".join(f"{name} {version}" for name, version in first.items())
    return Finding(VERSIONS.name, (line,), problems=tuple(dict.fromkeys(problems)))


VERSIONS = Part("versions", measure_versions, describe_versions, remedy="pip install --force-reinstall of this project")


# --- toolchain -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toolchain:
    """The facts about a rank's host, and the problems that follow for a run."""

    facts: Facts
    problems: list[Problem]
    warnings: list[str]


def measure_toolchain(subject: Subject, world: World) -> Toolchain:
    """Checks the facts that the training program checks before it reads weights."""
    facts = gather_facts(world.device)
    needs = needs_of(subject.compute_dtype(world.device), subject.models)
    return Toolchain(facts, find_problems(facts, needs), find_warnings(facts, needs))


def describe_toolchain(subject: Subject, toolchains: Sequence[Toolchain]) -> Finding:
    """Returns the driver and compiler of rank 0, and the problems of all ranks."""
    facts = toolchains[0].facts
    driver = f"NVIDIA driver {facts.driver}" if facts.driver else "no NVIDIA driver"
    header = "Python.h" if facts.has_python_h else "no Python.h"
    needed = "" if facts.gpu or facts.driver else " (only GPUs need them)"
    line = f"{driver}, C compiler {facts.compiler or 'none'}, {header}{needed}"
    hosts = [toolchain.facts.host for toolchain in toolchains]
    problems = [[with_remedy(p.what, p.remedy) for p in toolchain.problems] for toolchain in toolchains]
    warnings = tuple(dict.fromkeys(line for toolchain in toolchains for line in toolchain.warnings))
    return Finding(TOOLCHAIN.name, (line,), problems=by_host(hosts, problems), advice=warnings)


TOOLCHAIN = Part(
    "toolchain",
    measure_toolchain,
    describe_toolchain,
    remedy="GPUs that nvidia-smi lists without an error; TMPDIR, a folder to write in",
)
