"""What SLURM tells of a partition."""

import pytest

from launch.site import Site, ask_site
from tests.launch.conftest import FakeSlurm

SCONTROL = """SelectType = select/cons_tres
SelectTypeParameters    = CR_CORE_MEMORY
PartitionName=cpu Default=NO GraceTime=0 MaxTime=UNLIMITED
PartitionName=gpu Default=YES GraceTime=90 MaxTime=2-00:00:00
"""
"""The fake answers every question with all of it, in the order of the partitions."""
SINFO = """128|2000000|(null)|big
96|1031000|gpu:h100:8(S:0-1)|h1
64|515000|gpu:a100:8|a1
32|255000|gpu:h100:2,gpu:a100:2|mixed
16|64000|(null)|cpu
"""


def test_the_default_partition(slurm: FakeSlurm) -> None:
    slurm.answer("scontrol", SCONTROL)
    slurm.answer("sinfo", SINFO)
    assert ask_site(None, "8") == Site("gpu", 64, 515000, True, 90, 2880)
    assert "--partition=gpu" in slurm.calls("sinfo")[0]


def test_nodes_without_gpus_count_where_none_are_needed(slurm: FakeSlurm) -> None:
    slurm.answer("scontrol", SCONTROL)
    slurm.answer("sinfo", SINFO)
    found = ask_site(None, None)
    assert (found.cpus, found.memory_mib) == (16, 64000)


@pytest.mark.parametrize(
    ("gpus", "cpus", "memory"),
    [("8", 64, 515000), ("h100:8", 96, 1031000), ("h100:2", 32, 255000), ("4", 32, 255000), ("v100:1", None, None)],
)
def test_only_nodes_with_these_gpus_count(slurm: FakeSlurm, gpus: str, cpus: int | None, memory: int | None) -> None:
    slurm.answer("scontrol", SCONTROL)
    slurm.answer("sinfo", SINFO)
    found = ask_site(None, gpus)
    assert (found.cpus, found.memory_mib) == (cpus, memory)


@pytest.mark.parametrize(
    ("node", "cpus", "memory"),
    [
        ("CPUTot=96 CPUEfctv=94 CoreSpecCount=1 MemSpecLimit=8000", 94, 1023000),
        ("CPUTot=96 CoreSpecCount=2", 94, 1031000),
    ],
)
def test_what_is_reserved_for_the_system_does_not_count(slurm: FakeSlurm, node: str, cpus: int, memory: int) -> None:
    slurm.answer("scontrol", f"{SCONTROL}NodeName=h1 {node}\n")
    slurm.answer("sinfo", "96|1031000|gpu:h100:8|h1\n")
    found = ask_site("gpu", "8")
    assert (found.cpus, found.memory_mib) == (cpus, memory)


def test_a_partition_without_limits(slurm: FakeSlurm) -> None:
    slurm.answer(
        "scontrol", "SelectTypeParameters = CR_CPU\nPartitionName=cpu Default=NO GraceTime=0 MaxTime=UNLIMITED\n"
    )
    slurm.answer("sinfo", "4|1000|(null)|n1\n")
    assert ask_site("cpu,other", "1") == Site("cpu", None, None, False, 0, None)
    assert slurm.calls("scontrol")[0] == "show partition cpu --oneliner"


def test_no_answer(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.refuse("scontrol", "slurm_load_partitions error: Unable to contact slurm controller\n")
    assert ask_site(None, "1") == Site()
    monkeypatch.setenv("PATH", "/nowhere")
    assert ask_site("gpu", "1") == Site()
