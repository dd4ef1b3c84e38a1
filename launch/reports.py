"""The files by which the nodes of a job, and whoever follows it, tell each other what happens.

RUN/jobs/2026-01-31_10.15.00_4f1a/   one submission; beside it lie scripts, pickles and logs
    submitted.json                   cluster and job id, for whoever submits or follows
    outcome.json                     how it stands: written by the first node alone
    history.jsonl                    one line for each time the job ended
    status.json                      how the ranks ended, written by rank 0 (`dpo.base.status.write_status`)
    attempt-0/node-1.json            how a node's torchrun ended: written by that node; `failed` beside it if badly
    attempt-0/node-1/                torchrun's log folder: the exception of each rank that raised one
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from dpo.base.files import write_atomically
from dpo.run.files import JOBS
from launch.failures import Failure

State = Literal["running", "done", "failed", "stopped", "preempted", "crashed"]
FINAL = ("done", "failed")


@dataclass(frozen=True)
class Outcome:
    """How a submission stands, or how it ended."""

    state: State
    """running; done; failed; stopped: by a signal of SLURM or a person; preempted and crashed: it starts again."""
    message: str = ""
    """What people are told."""
    exit_code: int = 0
    """For a failure: 2 the user's input was wrong, 1 anything else."""
    traceback: str = ""
    """Of the exception that made it fail."""


@dataclass(frozen=True)
class NodeReport:
    """How the torchrun of one node ended."""

    exit_code: int
    failures: tuple[Failure, ...]


def new_submission(run_dir: Path) -> Path:
    """A folder for the reports of one submission, with a name that no other one has; not made yet."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H.%M.%S")
    return (run_dir / JOBS / f"{stamp}_{secrets.token_hex(2)}").absolute()


@dataclass(frozen=True)
class Attempt:
    """The files of one start of the job."""

    submission: Path
    """The folder of the submission."""
    number: int
    """How often the job was started before."""

    @property
    def status(self) -> Path:
        """What rank 0 writes when the ranks end well."""
        return self.submission / "status.json"

    @property
    def folder(self) -> Path:
        """Where the nodes report."""
        return self.submission / f"attempt-{self.number}"

    @property
    def failed(self) -> Path:
        """A file that is there once the torchrun of any node has failed."""
        return self.folder / "failed"

    def log_dir(self, node: int) -> Path:
        """torchrun's log folder."""
        return self.folder / f"node-{node}"

    def torchrun_error(self, node: int) -> Path:
        """Where torchrun writes an exception of its own, or copies that of its first rank."""
        return self.folder / f"node-{node}-torchrun.json"

    def _report(self, node: int) -> Path:
        return self.folder / f"node-{node}.json"

    def write_report(self, node: int, report: NodeReport) -> None:
        """Tells the first node how this one's torchrun ended."""
        write_json(self._report(node), asdict(report))
        if report.exit_code:
            self.failed.touch()

    def has_report(self, node: int) -> bool:
        """Whether a node has said how its torchrun ended."""
        return self._report(node).exists()

    def read_report(self, node: int) -> NodeReport:
        """What a node said."""
        facts = read_json(self._report(node))
        return NodeReport(facts["exit_code"], tuple(Failure(**failure) for failure in facts["failures"]))


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Says how a submission stands. For the first node alone."""
    write_json(folder / "outcome.json", asdict(outcome))


def read_outcome(folder: Path) -> Outcome | None:
    """How a submission stands; null: no node has started yet."""
    facts = read_json(folder / "outcome.json")
    return None if facts is None else Outcome(**facts)


def add_to_history(folder: Path, outcome: Outcome) -> None:
    """One line more about how the job ended this time, and at which checkpoint. For the first node alone."""
    line = {"time": datetime.now().isoformat(timespec="seconds"), "state": outcome.state, "message": outcome.message}
    line["checkpoint"] = _newest_checkpoint(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def history(folder: Path) -> list[State]:
    """The states in which the job ended before, in order."""
    return [line["state"] for line in _read_history(folder)]


def crashes_without_progress(folder: Path) -> int:
    """How often a crash has restarted the job since the run's newest checkpoint was saved."""
    newest = _newest_checkpoint(folder)
    return [line["checkpoint"] for line in _read_history(folder) if line["state"] == "crashed"].count(newest)


def _read_history(folder: Path) -> list[Any]:
    path = folder / "history.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _newest_checkpoint(folder: Path) -> str:
    """The name of the newest whole checkpoint in the run folder that a submission belongs to; empty: there is none."""
    markers = (folder.parents[1] / "checkpoints").glob("step-*/COMPLETE")
    return max((marker.parent.name for marker in markers), key=lambda name: (len(name), name), default="")


@dataclass(frozen=True)
class Submission:
    """What a submission became."""

    cluster: str
    job: str
    """SLURM's id; of a local job that of its process group."""
    log: str
    """The file that the first node writes to."""

    @property
    def whole(self) -> str:
        """The id of the array that the job belongs to; its own if it is in none."""
        return self.job.partition("_")[0]


def submissions(run_dir: Path) -> Iterator[tuple[Path, Submission]]:
    """All submissions into a run folder: the folder of their reports, and what became of them."""
    for path in sorted((run_dir / JOBS).glob("*/submitted.json")):
        facts = read_json(path)
        if facts is not None:
            yield path.parent, Submission(**facts)


def write_submission(folder: Path, submission: Submission) -> None:
    """Records under which id the job can be found."""
    write_json(folder / "submitted.json", asdict(submission))


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes a file that is never seen half-written."""
    write_atomically(path, json.dumps(facts, indent=1).encode())


def read_json(path: Path) -> Any:
    """The content of a file of `write_json`; null: it is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
