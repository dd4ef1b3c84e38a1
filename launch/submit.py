"""Submits a config as a job: `python -m launch.submit --config FILE --nodes 2 --gpus-per-node 8 --time 1-0`.

The command line and the config are checked completely before anything is queued.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.base.command import run_program
from dpo.base.console import warn
from dpo.base.errors import RunError
from dpo.run.files import JOBS
from launch import executors, torchrun
from launch.arguments import Request, parse_request, unused_here
from launch.checks import check_free, check_paths
from launch.follow import Followed, cancel_command, follow
from launch.here import RunsHere, run_here, start_in_background
from launch.node import NodeJob
from launch.reports import Submission, new_submission, write_submission
from launch.slurm_job import SlurmJob
from launch.sweep import PlannedRun, planned_runs, reference_passes


@dataclass(frozen=True)
class Plan:
    """The runs that a command line asks for, checked and ready to be submitted."""

    request: Request
    runs: Sequence[PlannedRun]
    references: Sequence[tuple[str, ...]]
    """Command lines of `dpo.reference`, whose jobs must end before the runs start."""

    @property
    def root(self) -> Path:
        """Returns the run folder, or the folder that contains all run folders of a sweep."""
        return self.runs[0].dir if len(self.runs) == 1 and not self.request.sweep else self.runs[0].dir.parent


def main() -> None:
    """Submits runs: `python -m launch.submit`."""
    request = parse_request()
    runs = planned_runs(request)
    for run in runs:
        check_paths(run.config, run.words)
    plan = Plan(request, runs, reference_passes(runs))
    if request.dry_run:
        print_scripts(plan)
        return
    executors.check_cluster(request)
    for run in runs:
        check_free(run.dir)
    if request.cluster == "slurm":
        submit_to_slurm(plan)
    else:
        submit_here(plan)


def _program(request: Request, module: str, words: tuple[str, ...]) -> torchrun.Program:
    return torchrun.Program(module, words, request.ranks_per_node, request.env)


def _job(request: Request, module: str, words: tuple[str, ...], run_dir: Path) -> NodeJob:
    """Returns a job with a new folder for its reports."""
    return NodeJob(_program(request, module, words), new_submission(run_dir), request.signal_delay, request.max_crashes)


# --- the queue --------------------------------------------------------------------------------------------------------


def submit_to_slurm(plan: Plan) -> None:
    """Queues the jobs that fill the reference cache, and the run or the array of runs that waits for them."""
    request, folder, name = plan.request, plan.root / JOBS, plan.root.name
    followed: list[Followed] = []
    for words in plan.references:
        job = _job(request, "dpo.reference", words, plan.root)
        submission = executors.submit_to_slurm(request, folder, f"{name}-reference", [SlurmJob(job)])[0]
        followed.append(_record(job, submission, "reference"))
    after = [item.submission.job for item in followed]
    jobs = [_job(request, "dpo.train", run.words, run.dir) for run in plan.runs]
    try:
        submissions = executors.submit_to_slurm(request, folder, name, [SlurmJob(job) for job in jobs], after)
    except RunError as failure:
        cancel = f"; to cancel queued jobs: {cancel_command('slurm', after)}" if after else ""
        raise RunError(f"{failure}{cancel}") from failure
    for run, job, submission in zip(plan.runs, jobs, submissions, strict=True):
        followed.append(_record(job, submission, run.dir.name))
    tell(plan, submissions, after)
    if request.follow:
        follow(followed)


def _record(job: NodeJob, submission: Submission, name: str) -> Followed:
    write_submission(job.folder, submission)
    return Followed(name, submission, job.folder)


def tell(plan: Plan, submissions: Sequence[Submission], after: Sequence[str] = ()) -> None:
    """Prints for each job its id and run folder, and the commands that follow and cancel it.

    Args:
        plan: the runs.
        submissions: the job of each run.
        after: ids of the jobs that fill the reference cache first.
    """
    for job in after:
        print(f"job     {job}  fills the reference cache first")
    for run, submission in zip(plan.runs, submissions, strict=True):
        print(f"job     {submission.job}\nrun     {run.dir}\nfollow  tail -F {shlex.quote(submission.log)}")
    jobs = dict.fromkeys([*after, *(submission.whole for submission in submissions)])
    print(f"cancel  {cancel_command(submissions[0].cluster, list(jobs))}", flush=True)


def print_scripts(plan: Plan) -> None:
    """Prints the script for sbatch and the torchrun command of each job, and submits nothing."""
    for words in plan.references:
        _print_script(plan, f"{plan.root.name}-reference")
        _print_line(plan.request, "dpo.reference", words)
    _print_script(plan, plan.root.name, len(plan.runs), ["REFERENCE_JOB"] * len(plan.references))
    for run in plan.runs:
        _print_line(plan.request, "dpo.train", run.words)


def _print_script(plan: Plan, name: str, count: int = 1, after: Sequence[str] = ()) -> None:
    if plan.request.cluster == "slurm":
        print(executors.sbatch_script(plan.request, plan.root / JOBS, name, count, after))


def _print_line(request: Request, module: str, words: tuple[str, ...]) -> None:
    line = torchrun.line(_program(request, module, words), request.nodes, request.python)
    print(f"# on each node, in {Path.cwd()}\n{line}\n")


# --- this machine -----------------------------------------------------------------------------------------------------


def submit_here(plan: Plan) -> None:
    """Starts the runs on this machine, in the background or in this process, one after another."""
    request = plan.request
    unused = unused_here(request)
    if unused:
        warn(f"--cluster {request.cluster} ignores {', '.join(unused)}")
    jobs = [_job(request, "dpo.train", run.words, run.dir) for run in plan.runs]
    references = [_job(request, "dpo.reference", words, plan.root) for words in plan.references]
    folder = jobs[0].folder if len(jobs) == 1 else new_submission(plan.root)
    work = RunsHere(tuple(references), tuple(jobs), folder)
    if request.cluster == "debug":
        run_here(work)
        return
    log = folder.with_name(f"{folder.name}_log.out")
    submission = Submission("local", str(start_in_background(work, log, request.python, request.setup)), str(log))
    for reports in {folder, *(job.folder for job in jobs)}:
        write_submission(reports, submission)
    tell(plan, [submission] * len(jobs))
    if request.follow:
        follow([Followed(plan.root.name, submission, folder)])


if __name__ == "__main__":
    sys.exit(run_program(main))
