"""One command from a config to a job: `python -m launch.submit --config FILE --nodes 2 --gpus-per-node 8 --time 1-0`.

Everything that can be wrong with the command line and the config is said before anything is queued.
"""

import shlex
import sys
from pathlib import Path

from dpo.config import Config, load_config
from launch import executors, torchrun
from launch.arguments import PROG, Request, parse_request
from launch.checks import check_free, check_paths
from launch.follow import cancel_command, follow
from launch.node import NodeJob
from launch.program import run_program
from launch.reports import Submission, new_submission, write_submission


def main() -> None:
    """`python -m launch.submit`."""
    request = parse_request()
    config = load_config(request.words, PROG)
    check_paths(config, request.words)
    submit_run(request, config)


def submit_run(request: Request, config: Config) -> None:
    """One run."""
    run_dir = Path(str(config.train.run_dir))
    program = torchrun.Program("dpo.train", request.words, request.ranks_per_node, request.env)
    if request.dry_run:
        print(executors.sbatch_script(request, run_dir / "jobs", run_dir.name))
        print(f"# on each node\n{torchrun.line(program, request.nodes, request.python)}")
        return
    executors.check_cluster(request)
    check_free(run_dir)
    reports = new_submission(run_dir)
    job = NodeJob(program, reports, request.grace, request.max_crashes)
    if request.cluster == "debug":
        executors.run_here(run_dir / "jobs", job)
        return
    if request.cluster == "local":
        submission = executors.submit_locally(request, run_dir / "jobs", job)
    else:
        submission = executors.submit_to_slurm(request, run_dir / "jobs", run_dir.name, [job])[0]
    write_submission(reports, submission)
    print(describe(submission, run_dir), flush=True)
    if request.follow:
        follow(submission, reports)


def describe(submission: Submission, run_dir: Path) -> str:
    """What the user needs to know of a job."""
    return (
        f"job     {submission.job}\n"
        f"run     {run_dir}\n"
        f"follow  tail -F {shlex.quote(submission.log)}\n"
        f"cancel  {cancel_command(submission)}"
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
