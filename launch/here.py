"""Starts runs on this machine, one after another: in this process, or in the background with this file as program.

There is no queue and no time limit: a run that saved and ended (SIGUSR2), or lost a rank, starts again at once. SIGTERM
and Ctrl-C end the work once the step is saved.
"""

import os
import pickle
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.base.files import write_file
from dpo.command.exits import run_program
from launch import stops
from launch.node import NodeJob
from launch.reports import Attempt, Outcome, history, write_outcome
from launch.torchrun import Place


@dataclass(frozen=True)
class RunsHere:
    """The runs that one process starts, one after another."""

    firsts: tuple[NodeJob, ...]
    """Jobs that prepare the input or fill the reference cache; if one fails, the runs are not started."""
    runs: tuple[NodeJob, ...]
    folder: Path
    """Folder of the report about all runs; of a single run, the folder of its own reports."""


def run_here(work: RunsHere) -> None:
    """Starts all runs, one after another. Raises SystemExit with the exit code of the first that failed, if any did."""
    outcomes = []
    for job in work.firsts:
        outcomes.append(run_to_end(job))
        if outcomes[-1].state != "done":
            break
    if all(outcome.state == "done" for outcome in outcomes):
        outcomes = [run_to_end(job) for job in work.runs]
    failures = [outcome for outcome in outcomes if outcome.state == "failed"]
    if len(work.runs) > 1:
        write_outcome(work.folder, _of_all(outcomes, failures))
    if failures:
        raise SystemExit(failures[0].exit_code)


def _of_all(outcomes: Sequence[Outcome], failures: Sequence[Outcome]) -> Outcome:
    if not failures:
        return Outcome("done")
    message = f"{len(failures)} of {len(outcomes)} runs failed, the first: {failures[0].message}"
    return Outcome("failed", message, failures[0].exit_code)


def run_to_end(job: NodeJob) -> Outcome:
    """Starts a run again until it is done or has failed, and returns its outcome. Raises SystemExit if a signal came
    that ends the work, also where the run was done already: the ranks have all the time to save, until a second one.
    """
    place = Place(0, (socket.gethostname(),), 0)
    while True:
        attempt = Attempt(job.folder, len(history(job.folder)))
        with stops.signals(goes_on=None) as noted:
            outcome = job.conclude(place, attempt, noted, job.run(place, attempt, noted))
        if noted.ended:  # nothing starts after it, whatever became of this run
            raise SystemExit(128 + noted.ended_by)
        if outcome.state in ("done", "failed"):
            return outcome


# --- in the background ------------------------------------------------------------------------------------------------


def start_in_background(work: RunsHere, log: Path, python: str, setup: Sequence[str]) -> int:
    """Starts a background process that does the work.

    Args:
        work: the runs.
        log: the file to which the process appends its output; its folder is made, and `work` is pickled beside it.
        python: the interpreter of the process.
        setup: lines of bash that run before it.

    Returns:
        The id of its process group, which is not the terminal's, so that Ctrl-C does not reach it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    file = log.with_suffix(".pkl")
    write_file(file, pickle.dumps(work))
    script = "\n".join(["set -e", *setup, f"exec {shlex.quote(python)} -u -m launch.here {shlex.quote(str(file))}"])
    with log.open("ab") as stream:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            *((os.POSIX_SPAWN_DUP2, stream.fileno(), number) for number in (1, 2)),
        ]
        defaults = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them, and a child would inherit that
        # Not a Popen: it warns if nobody waits for the process.
        process = os.posix_spawnp(
            "bash", ["bash", "-c", script], os.environ, file_actions=actions, setsid=True, setsigdef=defaults
        )
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # else a child that has ended would stay as a zombie and look alive
    return process


def main() -> None:
    """Starts the runs in a pickle, and removes it: `python -m launch.here FILE`, which `start_in_background` starts."""
    file = Path(sys.argv[1])
    work = pickle.loads(file.read_bytes())
    file.unlink()
    run_here(work)


if __name__ == "__main__":
    sys.exit(run_program(main))
