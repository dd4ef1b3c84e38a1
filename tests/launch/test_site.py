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
SINFO = """128|2000000|(null)
96|1031000|gpu:h100:8(S:0-1)
64|515000|gpu:a100:8
16|64000|(null)
"""


def test_the_default_partition(slurm: FakeSlurm) -> None:
    slurm.answer("scontrol", SCONTROL)
    slurm.answer("sinfo", SINFO)
    assert ask_site(None, with_gpus=True) == Site("gpu", 64, 515000, True, 90, 2880)
    assert "--partition=gpu" in slurm.calls("sinfo")[0]


def test_nodes_without_gpus_count_where_none_are_needed(slurm: FakeSlurm) -> None:
    slurm.answer("scontrol", SCONTROL)
    slurm.answer("sinfo", SINFO)
    found = ask_site(None, with_gpus=False)
    assert (found.cpus, found.memory_mib) == (16, 64000)


def test_a_partition_without_limits(slurm: FakeSlurm) -> None:
    slurm.answer(
        "scontrol", "SelectTypeParameters = CR_CPU\nPartitionName=cpu Default=NO GraceTime=0 MaxTime=UNLIMITED\n"
    )
    slurm.answer("sinfo", "4|1000|(null)\n")
    assert ask_site("cpu,other", with_gpus=True) == Site("cpu", None, None, False, 0, None)
    assert slurm.calls("scontrol")[0] == "show partition cpu --oneliner"


def test_no_answer(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.refuse("scontrol", "slurm_load_partitions error: Unable to contact slurm controller\n")
    assert ask_site(None, with_gpus=True) == Site()
    monkeypatch.setenv("PATH", "/nowhere")
    assert ask_site("gpu", with_gpus=True) == Site()
