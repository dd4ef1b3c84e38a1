"""Checks before a job is queued, so that a wrong path does not show only after hours in the queue."""

import os
import re
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from dpo.base.errors import UserError
from dpo.config import Config, with_place
from dpo.hub.ids import is_hub_id, is_tokenizer_id
from launch import squeue
from launch.reports import FINAL, Submission, read_outcome, submissions

_DATA_FILE = re.compile(r".*\.(jsonl|json|parquet|csv|tsv|txt)(\.gz)?")


def check_names(packages: Sequence[ModuleType], folder: Path) -> None:
    """Raises UserError for a file in `folder`, the current one, that hides a package: Python's -m imports from there
    first, so that ranks would run a dpo.py of the user (TRL's example script has this name).
    """
    for package in packages:
        found = PathFinder.find_spec(package.__name__, [str(folder)])
        if found and found.origin and not Path(found.origin).samefile(str(package.__file__)):
            what = f"a rank would import it in place of the package {package.__name__}"
            raise UserError(found.origin, what, "another name of the file, or another current folder")


def check_paths(config: Config, words: Sequence[str]) -> None:
    """Raises UserError for a local path of the config that does not exist. Paths that may be hub ids are not checked.

    Args:
        config: the config of the run.
        words: its command line; the error names the place in it that set the path.
    """
    for key, path in _paths(config):
        is_id = is_tokenizer_id if key == "model.tokenizer" else is_hub_id
        is_local = not is_id(path) or (key.startswith("data.") and _DATA_FILE.fullmatch(path))
        if is_local and not Path(path).expanduser().exists():
            failure = UserError(key, f"no such file or folder: {path}", "a path that exists on every node")
            raise with_place(failure, words)


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    models = {
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "reference.path": config.reference.path,
        "lora.path": config.lora.path,
    }
    yield from ((key, path) for key, path in models.items() if path)
    for key, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        yield from ((f"{key}[{i}].path", source.path) for i, source in enumerate(sources))


def check_free(run_dir: Path) -> None:
    """Raises UserError if an earlier job for this run folder still runs or waits in the queue."""
    for folder, submission in submissions(run_dir):
        outcome = read_outcome(folder)
        if (outcome is None or outcome.state not in FINAL) and is_active(submission):
            raise UserError(
                "train.run_dir",
                f"job {submission.job} is running or queued for {run_dir}",
                "another train.run_dir, or cancel the job first",
            )


def is_active(submission: Submission) -> bool:
    """Returns whether a job still waits or runs, as far as squeue or the process table can tell."""
    if submission.cluster == "slurm":
        return squeue.is_active(submission.job)
    try:
        os.killpg(int(submission.job), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the id has been reused by another user's processes
        return False
    return True
