"""Submits a config as a job: `python -m launch.submit --config FILE --nodes 2 --gpus-per-node 8 --time 1-0`.

The command line and the config are checked completely before anything is queued.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import dpo
import launch
from dpo.base.errors import RunError
from dpo.command.exits import run_program
from dpo.command.status import GPUS_ASKED
from dpo.run_folder.files import JOBS
from dpo.terminal.console import harmless, in_one_line, warn
from launch import executors, torchrun
from launch.arguments import Request, for_preparing, read_arguments, unused_here
from launch.checks import check_free, check_names, check_paths
from launch.containers import Bound, bound_folders, interpreter, lines_of, make_folders, pyxis_arguments
from launch.follow import Followed, cancel_command, follow
from launch.here import RunsHere, run_here, start_in_background
from launch.known import learn, site_of, site_to_prepare
from launch.node import NodeJob
from launch.reports import Submission, new_submission, write_submission
from launch.resources import with_cpus, with_settings
from launch.sbatch import doubts
from launch.slurm_job import SlurmJob
from launch.sweep import PlannedRun, planned_runs, prepare_passes, reference_passes


@dataclass(frozen=True)
class First:
    """A job that must end before the runs start."""

    module: str
    words: tuple[str, ...]
    request: Request
    """Its nodes and options."""
    purpose: str
    """For the user."""

    @property
    def name(self) -> str:
        """Returns the part of its name that follows the name of the run: prepare or reference."""
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class Plan:
    """The runs that a command line asks for, checked and ready to be submitted."""

    request: Request
    runs: Sequence[PlannedRun]
    firsts: Sequence[First]
    """In their order: each of them waits for those of other modules before it, the runs for all."""
    lines: Sequence[str]
    """The settings of the job, with the numbers behind them, for the user."""
    folders: Sequence[Bound]
    """The folders that a container must see; empty without a container."""

    @property
    def root(self) -> Path:
        """Returns the run folder, or the folder that contains all run folders of a sweep."""
        return self.runs[0].dir if len(self.runs) == 1 and not self.request.sweep else self.runs[0].dir.parent


def main() -> None:
    """Submits runs: `python -m launch.submit`."""
    request = read_arguments()
    for doubt in doubts(request.sbatch):
        warn(doubt)
    check_names((dpo, launch), Path.cwd())
    runs = planned_runs(request)
    for run in runs:
        check_paths(run.config, run.words)
    if not request.dry_run:
        executors.check_cluster(request)
        for run in runs:
            check_free(run.dir)
    plan = make_plan(request, runs)
    if request.dry_run:
        print_scripts(plan)
    elif request.cluster == "slurm":
        submit_to_slurm(plan)
    else:
        submit_here(plan)


def make_plan(request: Request, runs: Sequence[PlannedRun]) -> Plan:
    """Returns the plan of some runs: decides what the user left open, and warns of values that look wrong."""
    request, lines = _settled(request, runs) if request.cluster == "slurm" else (request, [])
    folders: list[Bound] = []
    if request.apptainer or request.container_image:
        folders = bound_folders([run.config for run in runs], request.words, os.environ | dict(request.env))
        request = replace(request, srun=tuple(pyxis_arguments(request, folders)))
    firsts: list[First] = []
    if request.prepare:
        site = site_to_prepare(request)
        alone = for_preparing(request, site.cpus, site.max_minutes)
        firsts = [First("dpo.prepare", words, alone, "prepares models and data") for words in prepare_passes(runs)]
    firsts += [First("dpo.reference", w, request, "fills the reference cache") for w in reference_passes(runs)]
    return Plan(request, runs, firsts, lines, folders)


def _settled(request: Request, runs: Sequence[PlannedRun]) -> tuple[Request, list[str]]:
    """Returns the request with a value for each option that the user left open, and the lines that tell them."""
    known = None if request.no_estimate else learn(request, runs[0])
    if known:
        request, settings = with_settings(request, known)
    else:
        request, settings = with_cpus(request, site_of(request))
    for setting in settings:
        if setting.warning:
            warn(setting.warning)
    lines = [setting.line for setting in settings]
    return request, lines + ([f"sweep   these are of the first of {len(runs)} runs"] if known and len(runs) > 1 else [])


def _program(plan: Plan, request: Request, module: str, words: tuple[str, ...]) -> torchrun.Program:
    asked = ((GPUS_ASKED, request.gpus),) if request.gpus and request.cluster != "slurm" else ()
    env = (*request.env, *asked)
    return torchrun.Program(module, words, request.ranks_per_node, env, interpreter(request, plan.folders))


def _job(plan: Plan, request: Request, module: str, words: tuple[str, ...], run_dir: Path) -> NodeJob:
    """Returns a job with a new folder for its reports."""
    program = _program(plan, request, module, words)
    return NodeJob(program, new_submission(run_dir), request.seconds_to_save, request.max_crashes)


def _first_job(plan: Plan, first: First) -> NodeJob:
    return _job(plan, first.request, first.module, first.words, plan.root)


# --- the queue --------------------------------------------------------------------------------------------------------


def submit_to_slurm(plan: Plan) -> None:
    """Queues the jobs that go first, and the run or the array of runs that waits for them."""
    make_folders(plan.folders)
    request, folder, name = plan.request, plan.root / JOBS, plan.root.name
    firsts: list[tuple[First, Followed]] = []
    try:
        for first in plan.firsts:
            job, after = _first_job(plan, first), _ids_before(first, firsts)
            works = [SlurmJob(job)]
            submission = executors.submit_to_slurm(first.request, folder, f"{name}-{first.name}", works, after)[0]
            firsts.append((first, _record(job, submission, first.name)))
        jobs = [_job(plan, request, "dpo.train", run.words, run.dir) for run in plan.runs]
        after = [item.submission.job for _, item in firsts]
        submissions = executors.submit_to_slurm(request, folder, name, [SlurmJob(job) for job in jobs], after)
    except RunError as failure:
        queued = [item.submission.job for _, item in firsts]
        cancel = f"; to cancel queued jobs: {cancel_command('slurm', queued)}" if queued else ""
        raise RunError(f"{failure}{cancel}") from failure
    followed = [item for _, item in firsts]
    for run, job, submission in zip(plan.runs, jobs, submissions, strict=True):
        followed.append(_record(job, submission, run.dir.name))
    tell(plan, submissions, [(item.submission.job, first.purpose) for first, item in firsts])
    if request.follow:
        follow(followed)


def _ids_before(first: First, firsts: Sequence[tuple[First, Followed]]) -> list[str]:
    """Returns the ids of the jobs of other modules, which must end before this one."""
    return [item.submission.job for other, item in firsts if other.module != first.module]


def _record(job: NodeJob, submission: Submission, name: str) -> Followed:
    write_submission(job.folder, submission)
    return Followed(name, submission, job.folder)


def tell(plan: Plan, submissions: Sequence[Submission], firsts: Sequence[tuple[str, str]] = ()) -> None:
    """Prints the settings, for each job its id and run folder, and the commands that follow and cancel it.

    Args:
        plan: the runs.
        submissions: the job of each run.
        firsts: (id, purpose) of the jobs that must end first.
    """
    for line in plan.lines:
        print(in_one_line(line))
    for job, purpose in firsts:
        print(in_one_line(f"job     {job}  {purpose} first"))
    for submission in dict.fromkeys(submissions):
        print(in_one_line(f"job     {submission.job}"))
        for run, its in zip(plan.runs, submissions, strict=True):
            if its == submission:  # one job on this machine starts all runs of a sweep
                print(in_one_line(f"run     {run.dir}"))
        print(in_one_line(f"follow  tail -F {shlex.quote(submission.log)}"))
    jobs = dict.fromkeys([*(job for job, _ in firsts), *(submission.whole for submission in submissions)])
    print(in_one_line(f"cancel  {cancel_command(submissions[0].cluster, list(jobs))}"), flush=True)


def print_scripts(plan: Plan) -> None:
    """Prints the settings, and the script for sbatch and the torchrun command of each job; submits nothing."""
    for line in [*plan.lines, *lines_of(plan.folders)]:
        print(in_one_line(f"# {line}"))
    placeholders: list[tuple[First, str]] = []
    for first in plan.firsts:
        after = [name for other, name in placeholders if other.module != first.module]
        _print_script(plan, first.request, f"{plan.root.name}-{first.name}", 1, after)
        _print_line(plan, first.request, first.module, first.words)
        placeholders.append((first, f"{first.name.upper()}_JOB"))
    _print_script(plan, plan.request, plan.root.name, len(plan.runs), [name for _, name in placeholders])
    for run in plan.runs:
        _print_line(plan, plan.request, "dpo.train", run.words)


def _print_script(plan: Plan, request: Request, name: str, count: int, after: Sequence[str]) -> None:
    if request.cluster == "slurm":
        print(harmless(executors.sbatch_script(request, plan.root / JOBS, name, count, after)))


def _print_line(plan: Plan, request: Request, module: str, words: tuple[str, ...]) -> None:
    line = torchrun.line(_program(plan, request, module, words), request.nodes, request.python)
    print(in_one_line(f"# on each node, in {Path.cwd()}"), in_one_line(line), "", sep="\n")


# --- this machine -----------------------------------------------------------------------------------------------------


def submit_here(plan: Plan) -> None:
    """Starts the runs on this machine, in the background or in this process, one after another."""
    request = plan.request
    unused = unused_here(request)
    if unused:
        warn(f"--cluster {request.cluster} ignores {', '.join(unused)}")
    make_folders(plan.folders)
    jobs = [_job(plan, request, "dpo.train", run.words, run.dir) for run in plan.runs]
    firsts = [_first_job(plan, first) for first in plan.firsts]
    folder = jobs[0].folder if len(jobs) == 1 else new_submission(plan.root)
    work = RunsHere(tuple(firsts), tuple(jobs), folder)
    if request.cluster == "debug":
        run_here(work)
        return
    log = folder.with_name(f"{folder.name}_log.out")
    submission = Submission(
        "local", str(start_in_background(work, log, request.launcher_python, request.setup)), str(log)
    )
    for reports in {folder, *(job.folder for job in jobs)}:
        write_submission(reports, submission)
    tell(plan, [submission] * len(jobs))
    if request.follow:
        follow([Followed(plan.root.name, submission, folder)])


if __name__ == "__main__":
    sys.exit(run_program(main))
