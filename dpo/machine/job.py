"""What the environment of a process says of its job: pure functions of environment variables, without torch.

Sources: https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES and sbatch's.
"""

from collections.abc import Mapping

from dpo.base.errors import UserError
from dpo.base.status import GPUS_ASKED

ASKING = (
    GPUS_ASKED,
    *("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"),
    *("SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK"),
)
"""Variables that say that a job has asked for GPUs."""


def asked_gpus(environment: Mapping[str, str]) -> str | None:
    """Returns the variable that says that this job asked for GPUs, as NAME=VALUE; None where it asked for none."""
    found = (f"{name}={environment[name]}" for name in ASKING if environment.get(name, "0") not in ("", "0"))
    return next(found, None)


def why_no_gpu(torch: str, cuda: str | None, driver: str | None) -> str:
    """Returns why torch finds no GPU on a machine.

    Args:
        torch: its version.
        cuda: the version of CUDA that it was built for; None for a build without CUDA.
        driver: the version of the NVIDIA driver; None where none is loaded.
    """
    if cuda is None:
        return f"torch {torch} is a build without CUDA"
    loaded = "no NVIDIA driver is loaded" if driver is None else f"the NVIDIA driver is {driver}"
    return f"{loaded}, torch {torch} is built for CUDA {cuda}"


def is_rank(environment: Mapping[str, str]) -> bool:
    """Returns whether torchrun, or `dpo`, has started this process as a rank of a run."""
    return "RANK" in environment


def check_tasks(environment: Mapping[str, str]) -> None:
    """Raises UserError in a step of srun with more tasks than nodes, where nothing made the tasks the ranks of one run:
    each task would be rank 0 of 1, and all of them would write the same run folder.

    A batch script is one process, whatever number of tasks its job has: it has a job and no step.
    """
    if is_rank(environment) or ("SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment):
        return
    tasks, nodes = (_number(environment, name) for name in ("SLURM_NTASKS", "SLURM_NNODES"))
    if tasks > max(nodes, 1):
        where = f"{nodes} nodes" if nodes > 1 else "one node"
        what = f"srun started {tasks} tasks on {where}, and each of them would be rank 0 of 1"
        valid = "one task per node that starts torchrun, or on one node `dpo train CONFIG --gpus N`; or launch.submit"
        raise UserError("SLURM_NTASKS", what, valid)


def check_one_node(environment: Mapping[str, str]) -> None:
    """Raises UserError in a step of srun with tasks on several nodes: `dpo` starts the ranks of one node, and each task
    would start a run of its own.
    """
    tasks = _number(environment, "SLURM_NTASKS")
    if "SLURM_STEP_ID" in environment and tasks > 1:
        valid = "torchrun --nnodes, or launch.submit, which starts torchrun on every node"
        raise UserError("SLURM_NTASKS", f"srun started {tasks} tasks, and dpo starts the ranks of one node", valid)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 0
