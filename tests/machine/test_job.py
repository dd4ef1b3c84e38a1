"""What the environment says of a job: the GPUs that it asked for, and tasks of srun that are no ranks."""

from collections.abc import Mapping

import pytest

from dpo.base.errors import UserError
from dpo.command.status import GPUS_ASKED
from dpo.machine.job import asked_gpus, check_one_node, check_tasks


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1"),
        ({"SLURM_GPUS": "h100:16"}, "SLURM_GPUS=h100:16"),
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, "SLURM_GPUS_PER_NODE=a100:4"),
        ({GPUS_ASKED: "2", "SLURM_GPUS_ON_NODE": "8"}, "DPO_GPUS_ASKED=2"),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"SLURM_GPUS_PER_NODE": "a100:0"}, None),
        ({"SLURM_JOB_GPUS": ""}, None),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),  # the id of the first GPU
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_STEP_GPUS": "0"}, "SLURM_STEP_GPUS=0"),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "64"}, None),
    ],
)
def test_the_gpus_that_a_job_asked_for(environment: Mapping[str, str], asked: str | None) -> None:
    assert asked_gpus(environment) == asked


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "8", "SLURM_NNODES": "1"},
        {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", **STEP},
        {"SLURM_NTASKS": "2"},
        {"SLURM_NTASKS": "8", **STEP, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"},
        {"SLURM_NTASKS": "8", "SLURM_NNODES": "8", **STEP, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"},
    ],
)
def test_srun_without_torchrun_is_refused(environment: Mapping[str, str]) -> None:
    with pytest.raises(UserError) as failure:
        check_tasks(environment)
    line = str(failure.value)
    assert line.startswith("SLURM_NTASKS: ") and environment["SLURM_NTASKS"] in line
    assert "torchrun" in line and "dpo train" in line


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", **STEP},
        {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", **STEP},  # one torchrun per node
        {"SLURM_NTASKS": "8", "SLURM_NNODES": "1", **STEP, "RANK": "3"},  # ranks, whoever set the variables
        {"SLURM_NTASKS": "8", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"},  # the batch script itself: one process
        {"SLURM_NTASKS": "eight"},
    ],
)
def test_other_starts_pass(environment: Mapping[str, str]) -> None:
    check_tasks(environment)


def salloc(tasks: int, nodes: int) -> dict[str, str]:
    """The shell of `salloc -n TASKS -N NODES` where SLURM starts it as a step of its own (use_interactive_step), with
    the id that SLURM gives such a step: https://slurm.schedmd.com/slurm.conf.html#OPT_use_interactive_step.
    """
    step = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    return {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(tasks), "SLURM_NNODES": str(nodes), **step}


@pytest.mark.parametrize(("tasks", "nodes"), [(8, 1), (16, 2), (2, 2)])
def test_the_shell_of_salloc_is_one_process(tasks: int, nodes: int) -> None:
    check_tasks(salloc(tasks, nodes))
    check_one_node(salloc(tasks, nodes))


def test_dpo_starts_the_ranks_of_one_node() -> None:
    """In a step with a task per node each task would train a run of its own; a batch script is one process."""
    with pytest.raises(UserError, match="srun started 2 tasks"):
        check_one_node({"SLURM_NTASKS": "2", "SLURM_NNODES": "2", **STEP})
    check_one_node({"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"})
    check_one_node({"SLURM_NTASKS": "1", "SLURM_NNODES": "1", **STEP})
