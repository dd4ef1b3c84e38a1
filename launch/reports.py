"""The files in which the nodes of a job report its state, for each other and for the commands that follow it.

RUN/jobs/2026-01-31_10.15.00_4f1a/   one submission; scripts, pickles and logs are next to it
    submitted.json                   cluster and job id: written by `launch.submit`
    outcome.json                     the state of the job: written by the first node alone
    history.jsonl                    one line for each time the job ended
    status.json                      how the ranks ended: written by rank 0 (`dpo.command.status.write_status`)
    attempt-0/node-1.json            how a node's torchrun ended: written by that node
    attempt-0/failed                 exists once the torchrun of any node has failed
    attempt-0/node-1.later.txt       output that was too much for the log (`launch.output`)
    attempt-0/node-1/                torchrun's log folder: the exception of each rank that raised
"""

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from dpo.base.files import naming, write_atomically
from dpo.command.blame import Failure
from dpo.run_folder.files import JOBS
from dpo.terminal.console import say

ATTEMPTS = 10
"""Starts of a job whose reports are kept: the first ones, with the first failure, and as many of the last."""

State = Literal["running", "done", "failed", "stopped", "preempted", "crashed"]
FINAL = ("done", "failed")


@dataclass(frozen=True)
class Outcome:
    """The state of a submission: running, or how it ended."""

    state: State
    """running; done; failed; stopped: by a signal from SLURM or a person; preempted, crashed: the job starts again."""
    message: str = ""
    """One line for the user."""
    exit_code: int = 0
    """For a failure: 2 if the user's input was wrong, 1 otherwise."""
    traceback: str = ""
    """The traceback of the exception that made the job fail."""


@dataclass(frozen=True)
class NodeReport:
    """How the torchrun of one node ended."""

    exit_code: int
    failures: tuple[Failure, ...]


def new_submission(run_dir: Path) -> Path:
    """Returns the path of a new folder for the reports of one submission, with a unique name. Does not make it."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H.%M.%S")
    return (run_dir / JOBS / f"{stamp}_{secrets.token_hex(2)}").absolute()


@dataclass(frozen=True)
class Attempt:
    """The files of one start of the job."""

    submission: Path
    """The folder of the submission."""
    number: int
    """Number of starts of the job before this one."""

    @property
    def status(self) -> Path:
        """Returns the file in which rank 0 tells how far the run is (`dpo.command.status`)."""
        return self.submission / "status.json"

    @property
    def folder(self) -> Path:
        """Returns the folder with the reports of the nodes."""
        return self.submission / f"attempt-{self.number}"

    @property
    def failed(self) -> Path:
        """Returns the path of a file that exists once the torchrun of any node has failed."""
        return self.folder / "failed"

    def log_dir(self, node: int) -> Path:
        """Returns torchrun's log folder on a node."""
        return self.folder / f"node-{node}"

    def later_output(self, node: int) -> Path:
        """Returns the file for a node's output that is too much for the log, see `launch.output`."""
        return self.folder / f"node-{node}.later.txt"

    def remove_others(self) -> None:
        """Removes the folders of earlier starts but those of the first and the last ATTEMPTS, and says so: a job may be
        preempted for weeks.
        """
        old = range(ATTEMPTS, self.number - ATTEMPTS)
        found = [path for number in old if (path := self.submission / f"attempt-{number}").is_dir()]
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        if found:
            names = f"{found[0].name} to {found[-1].name}" if len(found) > 1 else found[0].name
            say(f"removed {names} of {self.submission}, the reports of starts long ago")

    def torchrun_error(self, node: int) -> Path:
        """Returns torchrun's own error file on a node, with an exception of torchrun or a copy of its first rank's."""
        return self.folder / f"node-{node}-torchrun.json"

    def _report(self, node: int) -> Path:
        return self.folder / f"node-{node}.json"

    def write_report(self, node: int, report: NodeReport) -> None:
        """Writes how this node's torchrun ended, for the first node to read."""
        write_json(self._report(node), asdict(report))
        if report.exit_code:
            self.failed.touch()

    def has_report(self, node: int) -> bool:
        """Returns whether a node has reported how its torchrun ended."""
        return self._report(node).exists()

    def read_report(self, node: int) -> NodeReport:
        """Reads the report of a node."""
        facts = read_json(self._report(node))
        return NodeReport(facts["exit_code"], tuple(Failure(**failure) for failure in facts["failures"]))


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Writes the state of a submission. Called by the first node alone."""
    write_json(folder / "outcome.json", asdict(outcome))


def read_outcome(folder: Path) -> Outcome | None:
    """Reads the state of a submission; None if no node has started yet."""
    facts = read_json(folder / "outcome.json")
    return None if facts is None else Outcome(**facts)


def add_to_history(folder: Path, outcome: Outcome) -> None:
    """Appends a line to the history: how the job ended this time, and its newest checkpoint. Called by the first node
    alone.
    """
    line = {"time": datetime.now().isoformat(timespec="seconds"), "state": outcome.state, "message": outcome.message}
    line["checkpoint"] = newest_checkpoint(folder.parents[1])
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "history.jsonl", json.dumps(line) + "\n"
    with naming(path, len(text)), path.open("a", encoding="utf-8") as file:
        file.write(text)


def history(folder: Path) -> list[State]:
    """Returns the states in which the job has ended so far, in order."""
    return [line["state"] for line in _read_history(folder)]


def crashes_without_progress(folder: Path) -> int:
    """Returns the number of crashes since the newest checkpoint of the run was saved."""
    newest = newest_checkpoint(folder.parents[1])
    return [line["checkpoint"] for line in _read_history(folder) if line["state"] == "crashed"].count(newest)


def _read_history(folder: Path) -> list[Any]:
    path = folder / "history.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def newest_checkpoint(run_dir: Path) -> str:
    """Returns the name of the newest complete checkpoint of a run, such as step-000100; "" if it has none. One that a
    later start has put aside, such as step-000200.old, does not count.
    """
    names = [marker.parent.name for marker in (run_dir / "checkpoints").glob("step-*/COMPLETE")]
    numbered = [name for name in names if name.removeprefix("step-").isdigit()]
    return max(numbered, key=lambda name: int(name.removeprefix("step-")), default="")


@dataclass(frozen=True)
class Submission:
    """A submitted job."""

    cluster: str
    job: str
    """SLURM's id of the job; the id of the process group of a local job."""
    log: str
    """The log file of the first node."""

    @property
    def whole(self) -> str:
        """Returns the id of the array that the job belongs to, or the id of the job if it belongs to none."""
        return self.job.partition("_")[0]


def submissions(run_dir: Path) -> Iterator[tuple[Path, Submission]]:
    """Yields (folder of the reports, submitted job) for all submissions into a run folder, the oldest first."""
    for path in sorted((run_dir / JOBS).glob("*/submitted.json")):
        facts = read_json(path)
        if facts is not None:
            yield path.parent, Submission(**facts)


def write_submission(folder: Path, submission: Submission) -> None:
    """Writes the cluster, id and log of a submitted job."""
    write_json(folder / "submitted.json", asdict(submission))


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    write_atomically(path, json.dumps(facts, indent=1).encode())


def read_json(path: Path) -> Any:
    """Reads a file of `write_json`; None if it does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
