"""submitit's executors for a request, and what they submit: scripts and ids."""

import io
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import _make_sbatch_string

from dpo.errors import RunError, UserError
from launch.arguments import Request
from launch.reports import Submission

_FOREVER = 60 * 24 * 365
"""Minutes of a local job without --time."""

Work = Callable[[], None]


def slurm_parameters(request: Request, name: str, after: Sequence[str] = ()) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor for a job, or an array, that waits until the jobs `after` are done."""
    options: dict[str, str | bool] = {"requeue": True, **dict(request.sbatch)}
    if after:  # if one of them fails, this one would wait for ever
        options |= {"dependency": ":".join(["afterok", *after]), "kill-on-invalid-dep": "yes"}
    parameters: dict[str, Any] = {
        "job_name": name,
        "nodes": request.nodes,
        "ntasks_per_node": 1,
        "time": request.minutes,
        "signal_delay_s": request.signal_delay,
        "setup": list(request.setup),
        "stderr_to_stdout": True,
        "srun_args": _srun_args(request),
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
    """A task has all CPUs of its node, and reports its failure itself before any other is ended."""
    args = ["--cpu-bind=none", "--kill-on-bad-exit=0"]
    if request.container_image:
        here = os.fspath(Path.cwd())
        mounts = [f"{here}:{here}"] + ([request.container_mounts] if request.container_mounts else [])
        args += [f"--container-image={request.container_image}", f"--container-mounts={','.join(mounts)}"]
        args += [f"--container-workdir={here}"]
    return args


def sbatch_script(request: Request, folder: Path, name: str, count: int = 1, after: Sequence[str] = ()) -> str:
    """The script that sbatch would get for `count` jobs, also where SLURM is not installed."""
    where = folder.absolute()
    command = f"{shlex.quote(request.python)} -u -m submitit.core._submit {shlex.quote(str(where))}"
    parameters = slurm_parameters(request, name, after)
    script: str = _make_sbatch_string(command, where, map_count=count if count > 1 else None, **parameters)
    return script


def check_cluster(request: Request) -> None:
    """Raises UserError where there is no SLURM to submit to."""
    if request.cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        valid = "a machine with SLURM, --cluster local, --cluster debug, --dry-run"
        raise UserError(f"command line: --cluster: no sbatch on PATH; valid: {valid}")


def submit_to_slurm(
    request: Request, folder: Path, name: str, works: Sequence[Work], after: Sequence[str] = ()
) -> list[Submission]:
    """Queues jobs, as an array if there are several. Raises RunError where sbatch refuses."""
    executor = submitit.SlurmExecutor(folder, max_num_timeout=request.max_timeouts, python=shlex.quote(request.python))
    executor.update_parameters(**slurm_parameters(request, name, after))
    with _nothing_left_of_a_failure(folder):
        try:
            with redirect_stderr(io.StringIO()):  # submitit prints there what it also raises
                jobs = executor.submit_array(works)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as failure:
            raise RunError(f"sbatch refuses the job: {str(failure).replace('sbatch: error: ', '')}") from failure
    return [Submission("slurm", job.job_id, str(job.paths.stdout)) for job in jobs]


@contextmanager
def _nothing_left_of_a_failure(folder: Path) -> Iterator[None]:
    """Removes what appears in a folder during a with-block that fails, and the folders that are then empty."""
    before = set(folder.iterdir()) if folder.is_dir() else set()
    try:
        yield
    except BaseException:
        for path in set(folder.iterdir()) - before if folder.is_dir() else ():
            path.unlink()
        for empty in (folder, folder.parent):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
        raise


def submit_locally(request: Request, folder: Path, work: Work) -> Submission:
    """Starts a job on this machine, from a process that has left the terminal: Ctrl-C and its end do not reach it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_leave_terminal) as pool:
        return pool.submit(_start_local, request, folder, work).result()


def _leave_terminal() -> None:
    """A session of its own, and none of the submitter's streams: a pipe would stay open as long as the job."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)


def _start_local(request: Request, folder: Path, work: Work) -> Submission:
    executor = submitit.LocalExecutor(folder, max_num_timeout=request.max_timeouts, python=shlex.quote(request.python))
    gpus = int(request.gpus.rpartition(":")[2]) if request.gpus else 0
    executor.update_parameters(
        timeout_min=request.minutes or _FOREVER,
        signal_delay_s=request.signal_delay,
        gpus_per_node=gpus,
        setup=list(request.setup),
        stderr_to_stdout=True,
    )
    job = executor.submit(work)
    return Submission("local", str(os.getpgrp()), str(job.paths.stdout))


def run_here(folder: Path, work: Work) -> None:
    """Runs the job in this process. Raises SystemExit with the job's exit code unless it is done."""
    submitit.DebugExecutor(folder).submit(work).results()
