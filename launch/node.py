"""What runs on each node of a job: its torchrun; and on the first node what becomes of the job when that has ended.

| torchrun ended because                              | the job                                                     |
|-----------------------------------------------------|-------------------------------------------------------------|
| all ranks are done                                  | is done                                                     |
| SIGUSR2: time is up, or preempted; the ranks saved  | starts again; after time-outs at most --max-timeouts times  |
| SIGUSR2, but the ranks did not end in time          | the same; it goes on from the checkpoint before             |
| a rank raised an exception                          | fails, with that of the rank that was first                 |
| a rank was killed, or a node was lost               | starts again; without progress at most --max-crashes times  |
| SIGTERM, and SLURM lets the job run: preempted      | as SIGUSR2                                                  |
| SIGTERM: scancel, scontrol requeue, kill            | ends, and SLURM decides; a requeued one goes on             |

Every start goes on from the newest checkpoint of the run folder, since the command is the same.
"""

import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dpo.base.command import tell_error
from dpo.base.console import say, warn
from dpo.base.status import STATUS_FILE
from launch import supervise, torchrun
from launch.decision import End, decide
from launch.failures import Failure, failures_of_node
from launch.reports import (
    Attempt,
    NodeReport,
    Outcome,
    add_to_history,
    crashes_without_progress,
    read_json,
    write_outcome,
)
from launch.supervise import Signals
from launch.torchrun import Place

_REPORT_SECONDS = 90.0
"""How long the first node waits for what the others say: torchrun takes up to 30 s to end its ranks, and NFS up to 60
to show a new file."""


@dataclass(frozen=True)
class NodeJob:
    """A program on the nodes of a job."""

    program: torchrun.Program
    folder: Path
    """Of the submission's reports (`launch.reports`); all nodes see it."""
    signal_delay: int
    """Seconds between SIGUSR2 and the end of the job: three quarters for the ranks to save, one sixth to end them and
    to hear from all nodes, the rest for the requeueing."""
    max_crashes: int

    def run(self, place: Place, attempt: Attempt, noted: Signals) -> NodeReport:
        """This node's torchrun, to its end."""
        if place.node == 0:
            attempt.status.unlink(missing_ok=True)
            write_outcome(self.folder, Outcome("running"))
        logs, error_file = attempt.log_dir(place.node), attempt.torchrun_error(place.node)
        logs.mkdir(parents=True)
        words = torchrun.command(self.program, place, logs)
        files = {STATUS_FILE: attempt.status, "TORCHELASTIC_ERROR_FILE": error_file}
        env = torchrun.environment(self.program, files)
        self._tell_start(place, words)
        ended = supervise.run(words, env, noted, 0.75 * self.signal_delay, attempt.failed.exists)
        first_rank = place.node * self.program.ranks_per_node
        failures: list[Failure] = []
        if ended.exit_code:
            failures = failures_of_node(logs, error_file, ended.stderr, socket.gethostname(), first_rank)
        report = NodeReport(ended.exit_code, tuple(failures))
        attempt.write_report(place.node, report)
        return report

    def _tell_start(self, place: Place, words: list[str]) -> None:
        say(f"node {place.node} of {len(place.hosts)} ({socket.gethostname()}): {' '.join(words)}")
        if torchrun.num_cpus() < self.program.ranks_per_node:
            warn(f"{self.program.ranks_per_node} ranks share {torchrun.num_cpus()} CPUs; see --cpus-per-gpu")

    def conclude(self, place: Place, attempt: Attempt, noted: Signals, mine: NodeReport) -> Outcome:
        """What becomes of the job, from what all nodes say; tells it. For the first node alone."""
        reports = self._all_reports(place, attempt, noted) if mine.exit_code else [mine]
        noted.look()
        end = End(
            mine.exit_code,
            asked_to_stop=noted.stop_since is not None,
            was_ended=noted.ended,
            status=read_json(attempt.status) or {},
            failures=[failure for report in reports for failure in report.failures],
            crashes_before=crashes_without_progress(self.folder),
        )
        outcome = decide(end, self.max_crashes)
        return self.tell(outcome)

    def _all_reports(self, place: Place, attempt: Attempt, noted: Signals) -> list[NodeReport]:
        """What all nodes say; one that says nothing in time is lost."""
        nodes = range(len(place.hosts))
        deadline = time.monotonic() + _REPORT_SECONDS
        while not all(attempt.has_report(node) for node in nodes) and time.monotonic() < deadline and not noted.ended:
            time.sleep(0.2)
            noted.look()
            if noted.stop_since is not None:  # the job must be requeued before its time is over
                deadline = min(deadline, noted.stop_since + 11 / 12 * self.signal_delay)
        return [attempt.read_report(node) for node in nodes if attempt.has_report(node)]

    def tell(self, outcome: Outcome) -> Outcome:
        """Writes down how the job stands and says it."""
        write_outcome(self.folder, outcome)
        add_to_history(self.folder, outcome)
        if outcome.state == "failed":
            print(outcome.traceback, end="", file=sys.stderr)
            tell_error(outcome.message)
        else:
            say(f"{outcome.state}: {outcome.message}" if outcome.message else outcome.state)
        return outcome
