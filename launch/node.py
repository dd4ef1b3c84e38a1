"""The program on each node of a job: it runs torchrun, and on the first node decides whether the job starts again.

| torchrun ended because                              | the job                                                     |
|-----------------------------------------------------|-------------------------------------------------------------|
| all ranks are done                                  | is done                                                     |
| SIGUSR2 or SIGTERM after that: a tracker is slow    | is done                                                     |
| SIGUSR2: time is up, or preempted; the ranks saved  | starts again; after time-outs at most --max-timeouts times  |
| SIGUSR2, but the ranks did not end in time          | starts again from the previous checkpoint; same limit       |
| a rank raised an exception                          | fails, with the exception of the rank that failed first     |
| a rank was killed, or a node was lost               | starts again; without progress at most --max-crashes times  |
| SIGTERM, and SLURM lets the job run: preempted      | as SIGUSR2                                                  |
| SIGTERM: scancel, scontrol requeue; of a run on     | ends, saved where the ranks came to it within 3/4 of        |
| this machine kill, Ctrl-C                           | SLURM's KillWait; SLURM decides; a requeued job resumes     |
| that SIGTERM, of which another node heard first     | the same: SLURM is asked before the job starts again        |

SIGTERM of a job that SLURM lets run is taken for a preemption: on SLURM a job that gets it by `kill` starts again.
Every start resumes from the newest checkpoint in the run folder, since the command is the same.
"""

import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo.command.blame import Failure
from dpo.command.exits import tell_error
from dpo.command.status import STATUS_FILE
from dpo.terminal.console import harmless, say, warn
from launch import supervise, torchrun
from launch.decision import End, decide
from launch.failures import failures_of_node
from launch.reports import (
    Attempt,
    NodeReport,
    Outcome,
    add_to_history,
    crashes_without_progress,
    read_json,
    write_outcome,
)
from launch.stops import Signals
from launch.supervise import Ending, Watch
from launch.torchrun import Place

_REPORT_SECONDS = 90.0
"""How long the first node waits for the reports of the others: torchrun takes up to 30 s to end its ranks, and NFS up
to 60 s to show a new file."""

_OWN_SIGNAL_SECONDS = 2.0
"""How long the first node waits for a signal that has reached another node: SLURM sends it to all."""


@dataclass(frozen=True)
class Early:
    """What a signal means to a program before it has told a state."""

    ending: Ending
    outcome: str
    """Where the program was, for the outcome of the job."""


_EARLY: Mapping[str, Early] = {
    "dpo.train": Early(Ending("ending, before the first step there is nothing to save", 0.0), "before the first step"),
    "dpo.reference": Early(
        Ending("keeping the rows that are computed; a second signal ends it at once", 10.0),
        "before the end of the reference pass",
    ),
    "dpo.prepare": Early(Ending("ending; downloads and rows so far are in the caches", 0.0), "before all is prepared"),
}
"""By program."""

_SAVING = Ending("saving after the current step; a second signal ends the run at once")
_ENDINGS: Mapping[str, Ending] = {
    "training": _SAVING,
    "preempted": _SAVING,
    "done": Ending("all is saved, the run ends; a second signal ends it at once"),
}
"""By the state that rank 0 has told (`dpo.command.status`)."""


@dataclass(frozen=True)
class NodeJob:
    """A program on the nodes of a job."""

    program: torchrun.Program
    folder: Path
    """Folder of the submission's reports (`launch.reports`), which all nodes share."""
    signal_delay: int
    """Seconds between SIGUSR2 and the end of the job: 3/4 for the ranks to save, 1/6 to end them and to collect the
    reports of all nodes, 1/12 to requeue. Of 120 s: 90, 20 and 10 s."""
    max_crashes: int

    def run(self, place: Place, attempt: Attempt, noted: Signals) -> NodeReport:
        """Runs this node's torchrun to its end, and writes and returns the report of this node.

        Args:
            place: the place of this node among the nodes of the job.
            attempt: the files of this start of the job.
            noted: the signals of this process.
        """
        if place.node == 0:
            attempt.status.unlink(missing_ok=True)
            attempt.remove_others()
            write_outcome(self.folder, Outcome("running"))
        logs, error_file = attempt.log_dir(place.node), attempt.torchrun_error(place.node)
        logs.mkdir(parents=True)
        words = torchrun.command(self.program, place, logs)
        files = {STATUS_FILE: attempt.status, "TORCHELASTIC_ERROR_FILE": error_file}
        env = torchrun.environment(self.program, files)
        self._tell_start(place, words)
        watch = Watch(attempt.failed.exists, ending=lambda: self._ending(read_json(attempt.status) or {}))
        ended = supervise.run(words, env, noted, 0.75 * self.signal_delay, watch, attempt.later_output(place.node))
        first_rank = place.node * self.program.ranks_per_node
        failures: list[Failure] = []
        if ended.exit_code:
            failures = failures_of_node(logs, error_file, ended.stderr, socket.gethostname(), first_rank)
        report = NodeReport(ended.exit_code, tuple(failures))
        attempt.write_report(place.node, report)
        return report

    def _ending(self, status: Mapping[str, Any]) -> Ending:
        """Returns what a signal that ends the job means to ranks that have told `status`."""
        return _ENDINGS.get(status.get("state", ""), self._early.ending)

    @property
    def _early(self) -> Early:
        return _EARLY.get(self.program.module, _EARLY["dpo.train"])

    def _tell_start(self, place: Place, words: list[str]) -> None:
        say(f"node {place.node} of {len(place.hosts)} ({socket.gethostname()}): {' '.join(words)}")
        if torchrun.num_cpus() < self.program.ranks_per_node:
            warn(f"{self.program.ranks_per_node} ranks share {torchrun.num_cpus()} CPUs; see --cpus-per-gpu")

    def conclude(self, place: Place, attempt: Attempt, noted: Signals, own: NodeReport) -> Outcome:
        """Decides the outcome of the job from the reports of all nodes, then writes, prints and returns it. The first
        node alone calls this.

        Args:
            place: the place of this node among the nodes of the job.
            attempt: the files of this start of the job.
            noted: the signals of this process.
            own: the report of the first node.
        """
        reports = self._all_reports(place, attempt, noted) if own.exit_code else [own]
        noted.look()
        end = End(
            own.exit_code,
            asked_to_stop=noted.stop_since is not None,
            ended_by=noted.ended_by,
            status=read_json(attempt.status) or {},
            failures=[failure for report in reports for failure in report.failures],
            crashes_before=crashes_without_progress(self.folder),
            early=self._early.outcome,
        )
        outcome = decide(end, self.max_crashes)
        if outcome.state in ("preempted", "crashed") and noted.can_ask and noted.stop_since is None:
            _ask_for_all(noted)
            end = replace(end, asked_to_stop=noted.stop_since is not None, ended_by=noted.ended_by)
            outcome = decide(end, self.max_crashes)
        return self.tell(outcome)

    def _all_reports(self, place: Place, attempt: Attempt, noted: Signals) -> list[NodeReport]:
        """Waits for the reports of all nodes, and returns the reports that arrive in time; other nodes are lost."""
        nodes = range(len(place.hosts))
        deadline = time.monotonic() + _REPORT_SECONDS
        while not all(attempt.has_report(node) for node in nodes) and time.monotonic() < deadline and not noted.ended:
            time.sleep(0.2)
            noted.look()
            if noted.stop_since is not None:  # the job must be requeued before its time is over
                deadline = min(deadline, noted.stop_since + 11 / 12 * self.signal_delay)
        return [attempt.read_report(node) for node in nodes if attempt.has_report(node)]

    def tell(self, outcome: Outcome) -> Outcome:
        """Writes the outcome of the job to its reports, prints and returns it."""
        write_outcome(self.folder, outcome)
        add_to_history(self.folder, outcome)
        if outcome.state == "failed":
            print(harmless(outcome.traceback), end="", file=sys.stderr)
            tell_error(outcome.message)
        else:
            after = f": {outcome.message}" if outcome.message else ""
            say(f"{self.program.module} in {self.folder.parents[1]}: {outcome.state}{after}")
        return outcome


def _ask_for_all(noted: Signals) -> None:
    """Finds out whether a job that no signal has reached here may start again: the ranks save together, also where
    `scancel` has reached another node first, and end before the signal comes to this one.
    """
    deadline = time.monotonic() + _OWN_SIGNAL_SECONDS
    while noted.stop_since is None and time.monotonic() < deadline:
        time.sleep(0.1)
    noted.doubt()
    noted.look()
