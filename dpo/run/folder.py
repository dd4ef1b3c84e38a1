"""Decides from the run folder whether a start is fresh, resumes, or has nothing to do, and prepares the folder.

`dpo.run_folder.files` lists the files. A run that saves a checkpoint every 10 steps is killed in step 37. It starts
again:

    checkpoint.resume             resumes from   and `open_run_folder`
    auto                          step 30        drops the lines of metrics.jsonl after step 30
    RUN/checkpoints/step-000020   step 20        drops the lines after step 20, renames checkpoints/step-000030 to .old
    never                         UserError: the folder is not empty

Every function here is for rank 0 alone, which sends its decision to the others (`collectives.on_main`).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo.base.errors import UserError
from dpo.base.files import nearest_existing, write_atomically
from dpo.base.units import shown_bytes
from dpo.checkpoint.store import RunState, newer_checkpoints, newest_checkpoint, read_state
from dpo.config import Config, load_config, to_yaml
from dpo.run_folder.evaluations import drop_evaluations_after
from dpo.run_folder.files import (
    ANSWERS,
    CONFIG,
    EVALUATIONS,
    FINAL,
    JOBS,
    LOG,
    METRICS,
    PROVENANCE,
    REPORT,
    TENSORBOARD,
    TRACKERS,
    drop_metrics_after,
    read_metrics,
)
from dpo.terminal.console import say

KEY = "checkpoint.resume"


@dataclass(frozen=True)
class Start:
    """The beginning of a run: `checkpoint`, after `state.step` updates; both are None for a fresh start."""

    checkpoint: Path | None = None
    state: RunState | None = None

    @property
    def step(self) -> int:
        """Returns the number of updates that were made before."""
        return self.state.step if self.state else 0


def find_start(config: Config) -> Start:
    """Returns the start that `checkpoint.resume` gives with the run folder as it is. Writes nothing.

    Raises UserError where the folder cannot be written or used, or the checkpoint is not complete.
    """
    run_dir = Path(str(config.train.run_dir))
    _check_writable(run_dir)
    resume = config.checkpoint.resume
    if resume == "never":
        if run_dir.exists() and any(path.name not in (JOBS, LOG) for path in run_dir.iterdir()):
            raise UserError("train.run_dir", f"{run_dir} is not empty", f"a new folder, or {KEY} auto")
        return Start()
    checkpoint = newest_checkpoint(run_dir) if resume == "auto" else _named_checkpoint(Path(resume), run_dir)
    return Start(checkpoint, read_state(checkpoint, KEY)) if checkpoint else Start()


def _check_writable(run_dir: Path) -> None:
    present = nearest_existing(run_dir)
    if not present.is_dir():
        raise UserError("train.run_dir", f"{run_dir}: {present} is a file", "a folder, or a path that does not exist")
    if not os.access(present, os.W_OK | os.X_OK):
        raise UserError("train.run_dir", f"{run_dir}: cannot write to {present}", "a folder to write in")


def is_finished(config: Config, start: Start, last_step: int) -> bool:
    """Returns whether nothing is left to do: the checkpoint of the last step and the exported model exist.

    Args:
        config: gives the run folder.
        start: the start that `find_start` found.
        last_step: the number of steps of the whole run.
    """
    final = Path(str(config.train.run_dir)) / FINAL
    return start.step >= last_step and (final / "config.json").is_file() and any(final.glob("*.safetensors"))


def _named_checkpoint(folder: Path, run_dir: Path) -> Path:
    """Returns the checkpoint `folder`, or the newest checkpoint of the run folder `folder`.

    If it belongs to another run, the run in `run_dir` begins there. Once `run_dir` has its own checkpoints, it resumes
    from the newest of those, so that the same command works again after an interruption.
    """
    if not folder.is_dir():
        raise UserError(KEY, f"no such folder: {folder}", "auto, never, a run folder or RUN/checkpoints/step-000100")
    named = newest_checkpoint(folder) or folder
    own = None if _lies_in(named, run_dir) else newest_checkpoint(run_dir)
    if own:
        say(f"{KEY}: {run_dir} has checkpoints of its own: resumes from {own}, not from {named}")
    return own or named


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def lacks_evaluation(run_dir: Path, step: int) -> bool:
    """Returns whether metrics.jsonl lacks the evaluation after `step` steps, before which a run may have stopped."""
    return not any("eval/loss" in line and line["step"] == step for line in read_metrics(run_dir))


def open_run_folder(config: Config, start: Start, origin: Mapping[str, Any]) -> Path:
    """Prepares the run folder for the steps after `start`, and returns it.

    Removes or renames the files of steps that this start will compute again.

    Args:
        config: the config of this start, which is written.
        start: the start that `find_start` found.
        origin: the facts of this start (see `dpo.run.provenance`), which are added to provenance.json.
    """
    run_dir = Path(str(config.train.run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    if start.checkpoint:
        say(f"resumes from {start.checkpoint}")
        _log_changes(start.checkpoint.parent.parent / "config.yaml", config)
    write_atomically(run_dir / CONFIG, to_yaml(config).encode())
    _add_origin(run_dir / PROVENANCE, origin)
    for name in (FINAL, REPORT) if (run_dir / FINAL).exists() else ():
        _put_aside(run_dir / name)  # a shorter run's: with its model, this run would look finished when interrupted
    newer = newer_checkpoints(run_dir, start.step)
    for path in (*newer, run_dir / TRACKERS) if newer else ():
        _put_aside(path)  # a tracker keeps what it was sent of later steps: it gets a new run
    if start.checkpoint and _lies_in(start.checkpoint, run_dir):
        drop_metrics_after(run_dir, start.step)
        drop_evaluations_after(run_dir, start.step)
    else:
        for name in (METRICS, TENSORBOARD, TRACKERS, ANSWERS, EVALUATIONS, REPORT):
            _put_aside(run_dir / name)
    return run_dir


def _add_origin(path: Path, origin: Mapping[str, Any]) -> None:
    """Adds a start to provenance.json; reports where version or commit differ from the start before."""
    starts = read_starts(path)
    if starts is None:
        _put_aside(path)
        starts = []
    for key in ("version", "commit") if starts else ():
        if starts[-1].get(key) != origin[key]:
            say(f"the code has changed since this run's last start: {key} {starts[-1].get(key)} -> {origin[key]}")
    write_atomically(path, json.dumps([*starts, origin], indent=1).encode())


def read_starts(path: Path) -> list[dict[str, Any]] | None:
    """Returns the starts of a run, oldest first; None where the file is damaged, since a run does not need it."""
    try:
        return [dict(start) for start in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    except (ValueError, TypeError):
        return None


def _log_changes(path: Path, config: Config) -> None:
    try:
        before = load_config(["--config", str(path)], "dpo.train")
    except (OSError, UserError):  # perhaps of an older version; the run does not need it
        return
    old, new = _by_key(before), _by_key(config)
    for key in new:
        if old[key] != new[key]:
            say(f"changed since the checkpoint: {key}: {old[key]} -> {new[key]}")


def _by_key(config: Config) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, part in asdict(config).items() for key, value in part.items()}


def _put_aside(path: Path) -> None:
    """Renames `path`, where it exists, to PATH.old or PATH.old-N: it belongs to steps that this run computes again."""
    if path.exists():
        number = next(i for i in range(10**6) if not _old(path, i).exists())
        moved = path.rename(_old(path, number))
        for events in moved.rglob("*tfevents*"):  # else TensorBoard would find and show them
            events.rename(events.with_name(events.name.replace("tfevents", "old")))
        say(f"{path} belongs to an earlier run or to later steps: renamed to {moved}{_size_of_old(path)}")


def _size_of_old(path: Path) -> str:
    """Returns the bytes that the folders take which were put aside for `path`, as words; none for a file."""
    folders = [old for old in path.parent.glob(f"{path.name}.old*") if old.is_dir()]
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    what = f"{path.name}.old and later ones take" if len(folders) > 1 else "it takes"
    return f"; {what} {shown_bytes(size)}, which you may remove" if folders else ""


def _old(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.old" + (f"-{number}" if number else ""))
