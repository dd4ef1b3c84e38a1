"""The cluster itself: what a job must find on it before anything of this package is asked."""

import subprocess


def test_tasks_run_on_both_nodes_and_see_their_gpus() -> None:
    """Two nodes of two fake GPUs each, whose tasks have the names of their nodes."""
    task = ["sh", "-c", "echo $(hostname) $SLURM_NODEID $CUDA_VISIBLE_DEVICES"]
    command = ["srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", *task]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert sorted(printed.splitlines()) == ["node1 0 0,1", "node1 0 0,1", "node2 1 0,1", "node2 1 0,1"]
