"""What one task of a job runs: this node's torchrun, and on the first node what becomes of the job when it ends.

| torchrun ended because                              | the job                                                     |
|-----------------------------------------------------|-------------------------------------------------------------|
| all ranks are done                                  | is done                                                     |
| SIGUSR2: time is up, or preempted; the ranks saved  | is requeued; time-outs at most --max-timeouts times         |
| SIGUSR2, but the ranks did not end in time          | the same; it goes on from the checkpoint before             |
| a rank raised an exception                          | fails, with that of the rank that was first                 |
| a rank was killed, or a node was lost               | is requeued, at most --max-crashes times; then it fails     |
| SIGTERM: scancel, scontrol requeue                  | ends, and SLURM decides; a requeued one goes on             |

Every start goes on from the newest checkpoint of the run folder, since the command is the same. The requeueing itself
is submitit's: its handler of SIGUSR2 counts the time-outs. It takes every preemption of a job whose limit is 10 minutes
or less for one, and a crash in the last fifth of the limit.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit

from dpo.config import with_place
from dpo.progress import say, warn
from dpo.run_files import STATUS_FILE
from launch import squeue, supervise, torchrun
from launch.decision import End, decide
from launch.failures import Failure, failures_of_node
from launch.program import tell_error
from launch.reports import (
    Attempt,
    NodeReport,
    Outcome,
    add_to_history,
    history,
    read_json,
    write_outcome,
)

_REPORT_SECONDS = 90.0
"""How long the first node waits for what the others say: torchrun takes up to 30 s to end its ranks, and NFS up to 60
to show a new file."""


@dataclass(frozen=True)
class NodeJob:
    """The callable that submitit pickles, and runs once on each node."""

    program: torchrun.Program
    folder: Path
    """Of the submission's reports (`launch.reports`); all nodes see it."""
    grace: float
    """Seconds between SIGUSR2 and the end of ranks that do not end themselves."""
    max_crashes: int

    def __call__(self) -> None:
        """Runs this node; raises SystemExit with the job's exit code unless the job is done."""
        place, attempt = _where(self.folder)
        if place.node == 0:
            attempt.status.unlink(missing_ok=True)
            write_outcome(self.folder, Outcome("running"))
        with supervise.signals() as noted:
            report = self._run(place, attempt, noted)
            attempt.write_report(place.node, report)
            if place.node != 0:  # the first node decides
                raise SystemExit(1 if report.exit_code else 0)
            outcome = self._outcome(place, attempt, noted, report)
        self.conclude(outcome)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit runs after requeueing: the same again."""
        return submitit.helpers.DelayedSubmission(self)

    def _run(self, place: torchrun.Place, attempt: Attempt, noted: supervise.Signals) -> NodeReport:
        """This node's torchrun, to its end."""
        logs, error_file = attempt.log_dir(place.node), attempt.torchrun_error(place.node)
        logs.mkdir(parents=True)
        words = torchrun.command(self.program, place, logs)
        files = {STATUS_FILE: attempt.status, "TORCHELASTIC_ERROR_FILE": error_file}
        env = torchrun.environment(self.program, files)
        self._tell_start(place, words)
        ended = supervise.run(words, env, noted, self.grace, attempt.failed.exists)
        first_rank = place.node * self.program.ranks_per_node
        failures: list[Failure] = []
        if ended.exit_code:
            failures = failures_of_node(logs, error_file, ended.stderr, socket.gethostname(), first_rank)
        return NodeReport(ended.exit_code, tuple(failures))

    def _tell_start(self, place: torchrun.Place, words: list[str]) -> None:
        say(f"node {place.node} of {len(place.hosts)} ({socket.gethostname()}): {' '.join(words)}")
        if torchrun.num_cpus() < self.program.ranks_per_node:
            warn(f"{self.program.ranks_per_node} ranks share {torchrun.num_cpus()} CPUs; see --cpus-per-gpu")

    def _outcome(self, place: torchrun.Place, attempt: Attempt, noted: supervise.Signals, mine: NodeReport) -> Outcome:
        """What becomes of the job, from what all nodes say. For the first node alone."""
        reports = _all_reports(place, attempt) if mine.exit_code and not noted.ended else [mine]
        end = End(
            mine.exit_code,
            asked_to_stop=noted.stop_since is not None,
            was_ended=noted.ended,
            status=read_json(attempt.status) or {},
            failures=[failure for report in reports for failure in report.failures],
            crashes_before=history(self.folder).count("crashed"),
        )
        outcome = decide(end, self.max_crashes)
        return replace(outcome, message=with_place(outcome.message, self.program.words))

    def conclude(self, outcome: Outcome) -> None:
        """Tells the outcome, requeues the job if it must start again, and ends this process unless the job is done."""
        self._tell(outcome)
        if outcome.state in ("preempted", "crashed"):
            outcome = self._requeue(outcome)
        if outcome.state == "stopped" and _runs_on():
            # SLURM preempts with a time of grace, or a person sent SIGTERM: nothing else would start it again.
            outcome = self._requeue(Outcome("preempted", "SIGTERM, and SLURM lets the job go on", 143))
        if outcome.state != "done":
            raise SystemExit(outcome.exit_code)

    def _tell(self, outcome: Outcome) -> None:
        write_outcome(self.folder, outcome)
        add_to_history(self.folder, outcome)
        if outcome.state == "failed":
            print(outcome.traceback, end="", file=sys.stderr)
            tell_error(outcome.message)
        else:
            say(f"{outcome.state}: {outcome.message}" if outcome.message else outcome.state)

    def _requeue(self, outcome: Outcome) -> Outcome:
        """Has submitit requeue the job, and ends this process; gives an outcome where that is not possible."""
        handler: Any = signal.getsignal(signal.SIGUSR2)
        if not callable(handler):
            say("cluster debug has no queue; the same command goes on")
            return outcome
        try:
            handler(signal.SIGUSR2, None)
            raise AssertionError("submitit requeues the job and raises SystemExit")
        except submitit.core.utils.UncompletedJobError:
            end = Outcome("failed", "its time was up too often (--max-timeouts); the same command goes on", 1)
        except (OSError, subprocess.SubprocessError) as failure:
            end = Outcome("failed", f"the job cannot be requeued ({failure}); the same command goes on", 1)
        self._tell(end)
        return end


def _where(folder: Path) -> tuple[torchrun.Place, Attempt]:
    """This task's place in its job."""
    job = submitit.JobEnvironment()
    hosts = tuple(job.hostnames)
    place = torchrun.Place(job.node, hosts, torchrun.master_port(job.raw_job_id) if len(hosts) > 1 else 0)
    if job.cluster == "slurm":  # all nodes must come to the same number
        return place, Attempt(folder, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    return place, Attempt(folder, len(history(folder)))


def _runs_on() -> bool:
    """Whether SLURM means this job to go on: it neither cancels nor requeues it."""
    job = submitit.JobEnvironment()
    return job.cluster == "slurm" and squeue.state(job.raw_job_id) == "RUNNING"


def _all_reports(place: torchrun.Place, attempt: Attempt) -> list[NodeReport]:
    """What all nodes say; one that says nothing in time is lost."""
    nodes = range(len(place.hosts))
    deadline = time.monotonic() + _REPORT_SECONDS
    while not all(attempt.has_report(node) for node in nodes) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [attempt.read_report(node) for node in nodes if attempt.has_report(node)]
