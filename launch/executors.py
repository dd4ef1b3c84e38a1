"""Submits jobs through submitit's executor, and prints the scripts that it would submit."""

import io
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import _make_sbatch_string

from dpo.base.errors import RunError, UserError
from launch.arguments import Request
from launch.reports import Submission

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")
"""Device files of GPU drivers; a machine whose GPUs torch can use has one of them."""

Work = Callable[[], None]


def slurm_parameters(request: Request, name: str, after: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the parameters of submitit's SlurmExecutor for a job or an array.

    Args:
        request: the nodes, time and options that the user asked for.
        name: the name of the job.
        after: ids of the jobs that must be done first.
    """
    options: dict[str, str | bool] = {"requeue": True, **dict(request.sbatch)}
    if after:  # by default a job whose dependency has failed stays in the queue forever
        options |= {"dependency": ":".join(["afterok", *after]), "kill-on-invalid-dep": "yes"}
    parameters: dict[str, Any] = {
        "job_name": name,
        "nodes": request.nodes,
        "ntasks_per_node": 1,
        "time": request.minutes,
        "signal_delay_s": request.seconds_to_save,
        "setup": list(request.setup),
        "stderr_to_stdout": True,
        "srun_args": _srun_args(request),
        "wckey": None,  # submitit's default is a key that a cluster that tracks keys does not know
        "additional_parameters": options,
    }
    if request.gpus:
        parameters["gpus_per_node"] = request.gpus
    if request.cpus_per_gpu:
        parameters["cpus_per_task"] = request.cpus_per_gpu * request.ranks_per_node
    if request.max_parallel:
        parameters["array_parallelism"] = request.max_parallel
    return parameters


def _srun_args(request: Request) -> list[str]:
    """Returns srun's arguments: every task has all CPUs of its node, and srun does not end tasks when another task
    ends, since the first node must still collect the reports of all nodes.
    """
    return ["--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0", *request.srun]


def sbatch_script(request: Request, folder: Path, name: str, count: int = 1, after: Sequence[str] = ()) -> str:
    """Returns the script that would be submitted for `count` jobs. Works without SLURM.

    Args:
        request: the command line of the launcher.
        folder: for pickles and logs of the jobs.
        name: of the job.
        count: number of jobs; more than 1 makes an array.
        after: ids of the jobs to wait for.
    """
    where = folder.absolute()
    command = f"{shlex.quote(request.launcher_python)} -u -m submitit.core._submit {shlex.quote(str(where))}"
    parameters = slurm_parameters(request, name, after)
    script: str = _make_sbatch_string(command, where, map_count=count if count > 1 else None, **parameters)
    return script


def check_cluster(request: Request) -> None:
    """Raises UserError if SLURM is asked for and not installed, or GPUs for a run on this machine that has none."""
    if request.cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        valid = "a machine with SLURM, --cluster local, --cluster debug, --dry-run"
        raise UserError("command line: --cluster", "no sbatch on PATH", valid)
    if request.cluster != "slurm" and request.gpus and not any(map(os.path.exists, GPU_DRIVERS)):
        raise UserError("command line: --gpus-per-node", "this machine has none", "0, with --ranks-per-node N")


def submit_to_slurm(
    request: Request, folder: Path, name: str, works: Sequence[Work], after: Sequence[str] = ()
) -> list[Submission]:
    """Queues jobs, as an array if there are several, and returns their ids and logs. Raises RunError if sbatch refuses
    them.

    Args:
        request: the command line of the launcher.
        folder: for scripts, pickles and logs of the jobs.
        name: of the job.
        works: the callable of each job.
        after: ids of the jobs to wait for.
    """
    executor = submitit.SlurmExecutor(
        folder, max_num_timeout=request.max_timeouts, python=shlex.quote(request.launcher_python)
    )
    executor.update_parameters(**slurm_parameters(request, name, after))
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints its exceptions too
            jobs = executor.submit_array(works)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as failure:
        raise RunError(f"sbatch refuses the job: {str(failure).replace('sbatch: error: ', '')}") from failure
    return [Submission("slurm", job.job_id, str(job.paths.stdout)) for job in jobs]
