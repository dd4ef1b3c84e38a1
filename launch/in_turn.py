"""Several runs as one job, one after the other: how a sweep uses one machine."""

from dataclasses import dataclass
from pathlib import Path

import submitit

from launch.node import NodeJob
from launch.reports import FINAL, Outcome, read_outcome, write_outcome


@dataclass(frozen=True)
class InTurn:
    """The callable that submitit pickles. Started again, it goes on with the run that it was at."""

    references: tuple[NodeJob, ...]
    """Without these the runs are not started."""
    runs: tuple[NodeJob, ...]
    folder: Path
    """Of this submission's own reports."""

    def __call__(self) -> None:
        """Runs all; raises SystemExit(1) if any failed."""
        write_outcome(self.folder, Outcome("running"))
        outcomes = [_outcome_of(job) for job in self.references]
        if all(outcome.state == "done" for outcome in outcomes):
            outcomes = [_outcome_of(job) for job in self.runs]
        failures = [outcome for outcome in outcomes if outcome.state == "failed"]
        if failures:
            message = f"{len(failures)} of {len(outcomes)} runs failed, the first: {failures[0].message}"
            write_outcome(self.folder, Outcome("failed", message, failures[0].exit_code))
            raise SystemExit(failures[0].exit_code)
        write_outcome(self.folder, Outcome("done"))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit runs after requeueing."""
        return submitit.helpers.DelayedSubmission(self)


def _outcome_of(job: NodeJob) -> Outcome:
    """How a run ends, or ended before; what is no end (it was told to stop) ends this process."""
    outcome = read_outcome(job.folder)
    if outcome is None or outcome.state not in FINAL:
        try:
            job()
        except SystemExit:
            outcome = read_outcome(job.folder)
            if outcome is None or outcome.state not in FINAL:
                raise
        outcome = read_outcome(job.folder)
    assert outcome is not None
    return outcome
