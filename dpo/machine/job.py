"""What the environment of a process says of its job: pure functions of environment variables, without torch.

Sources: https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES and sbatch's.
"""

from collections.abc import Mapping

from dpo.base.errors import UserError
from dpo.command.rank import is_rank
from dpo.command.status import GPUS_ASKED

COUNTS = (GPUS_ASKED, "SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK")
"""Variables that hold the number of GPUs that a job has asked for: 8, or with a type a100:8; 0 is none."""
IDS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
"""Variables that list the ids of the GPUs that a job got: 0,1; 0 alone is the GPU with this id."""


def asked_gpus(environment: Mapping[str, str]) -> str | None:
    """Returns the variable that says that this job asked for GPUs, as NAME=VALUE; None where it asked for none."""
    given = [name for name in COUNTS if environment.get(name, "").rpartition(":")[2] not in ("", "0")]
    given += [name for name in IDS if environment.get(name)]
    return f"{given[0]}={environment[given[0]]}" if given else None


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


def requeued_job(environment: Mapping[str, str]) -> tuple[str | None, int]:
    """Returns the id of the job of SLURM, and how often it was restarted; (None, 0) outside of one. Each task of an
    array has an id of its own; several clusters may use the same.
    """
    job = environment.get("SLURM_JOB_ID")
    count = environment.get("SLURM_RESTART_COUNT", "")
    cluster = environment.get("SLURM_CLUSTER_NAME")
    named = f"{job} of {cluster}" if cluster else job
    return (named, int(count) if count.isdecimal() else 0) if job else (None, 0)


def launch_of(environment: Mapping[str, str]) -> str | None:
    """Returns the id that the user gave to torchrun, `--rdzv-id`; None without torchrun, or where none was given: all
    such runs have the same.
    """
    launch = environment.get("TORCHELASTIC_RUN_ID")
    return launch if launch not in ("", "none") else None


def check_tasks(environment: Mapping[str, str]) -> None:
    """Raises UserError in a step of srun with more tasks than nodes, where nothing made the tasks the ranks of one run:
    each task would be rank 0 of 1, and all of them would write the same run folder.

    A batch script is one process, whatever number of tasks its job has: it has a job and no step. The shell of salloc
    may be a step of its own, of one task, where the job has many.
    """
    if is_rank(environment) or ("SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment):
        return
    tasks, nodes = _of_step(environment, "NTASKS", "NUM_TASKS"), _of_step(environment, "NNODES", "NUM_NODES")
    if tasks > max(nodes, 1):
        where = f"{nodes} nodes" if nodes > 1 else "one node"
        what = f"srun started {tasks} tasks on {where}, and each of them would be rank 0 of 1"
        valid = "one task per node that starts torchrun, or on one node `dpo train CONFIG --gpus N`; or launch.submit"
        raise UserError("SLURM_NTASKS", what, valid)


def check_one_node(environment: Mapping[str, str]) -> None:
    """Raises UserError in a step of srun with tasks on several nodes: `dpo` starts the ranks of one node, and each task
    would start a run of its own.
    """
    tasks = _of_step(environment, "NTASKS", "NUM_TASKS")
    if "SLURM_STEP_ID" in environment and tasks > 1:
        valid = "torchrun --nnodes, or launch.submit, which starts torchrun on every node"
        raise UserError("SLURM_NTASKS", f"srun started {tasks} tasks, and dpo starts the ranks of one node", valid)


def _of_step(environment: Mapping[str, str], of_job: str, of_step: str) -> int:
    """Returns the number in SLURM_STEP_`of_step`; where there is none, that in SLURM_`of_job`, else 0."""
    texts = (environment.get(name, "") for name in (f"SLURM_STEP_{of_step}", f"SLURM_{of_job}"))
    return next((int(text) for text in texts if text.isdecimal()), 0)
