"""Decides from the run folder whether a start is fresh, resumes, or has nothing to do, and prepares the folder.

`dpo.run_folder.files` lists the files. A run that saves a checkpoint every 10 steps is killed in step 37. It starts
again:

    checkpoint.resume             resumes from   and `open_run_folder`
    auto                          step 30        drops the lines of metrics.jsonl after step 30
    RUN/checkpoints/step-000020   step 20        drops the lines after step 20, renames checkpoints/step-000030 to .old
    the same once more            the newest     goes on, as a job that is queued again must
    never                         UserError: the folder is not empty

Every function here is for rank 0 alone, which sends its decision to the others (`collectives.on_main`). All ranks
together compare the files of a checkpoint with their hashes (`dpo.train.start`).
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
from dpo.checkpoint.folders import CHECKPOINTS, checkpoints_of, newer_checkpoints, own_checkpoint
from dpo.checkpoint.state import VALID, RunState, read_verified_state
from dpo.config import Config, load_config, to_yaml
from dpo.hub.files import find_config
from dpo.run_folder.evaluations import drop_evaluations_after
from dpo.run_folder.files import (
    ANSWERS,
    CONFIG,
    EVALUATIONS,
    FINAL,
    JOBS,
    LOCK,
    LOG,
    METRICS,
    NONFINITE,
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


def find_candidates(config: Config) -> list[Path]:
    """Returns the checkpoints from which `checkpoint.resume` may resume, with the run folder as it is: the first that
    is whole is used. None where the start is fresh. Writes nothing, and opens no checkpoint.

    Raises UserError where the folder cannot be used.
    """
    run_dir, resume = Path(str(config.train.run_dir)), config.checkpoint.resume
    if resume == "never":
        if not _is_unused(run_dir):
            raise UserError("train.run_dir", f"{run_dir} is not empty", f"a new folder, or {KEY} auto")
        return []
    own = list(reversed(checkpoints_of(run_dir)))
    return own if resume == "auto" else _named_checkpoints(Path(resume), run_dir, own)


def _is_unused(run_dir: Path) -> bool:
    """Returns whether a run folder has no files of a run; it may not exist."""
    try:
        return all(path.name in (JOBS, LOCK, LOG) for path in run_dir.iterdir())
    except FileNotFoundError:  # also where another start that ends removes it at this moment
        return True


def start_from(found: Path | None, faults: Mapping[Path, str], config: Config) -> Start:
    """Returns the start from a checkpoint that is whole, or a fresh one.

    Args:
        found: the checkpoint; None: none of the candidates is whole.
        faults: the candidates that are not, and why.
        config: tells which checkpoints were asked for.

    Raises:
        UserError: there are candidates, and none is whole, or its state is not that of a run.
    """
    if found:
        return Start(found, read_verified_state(found, KEY))
    if len(faults) == 1:
        ((path, fault),) = faults.items()
        raise UserError(KEY, f"{path}: {fault}", _way_on(path, config))
    if faults:
        each = "; ".join(f"{path.name}: {fault}" for path, fault in faults.items())
        path = next(iter(faults))
        what = f"none of the {len(faults)} checkpoints in {path.parent} can be used: {each}"
        raise UserError(KEY, what, _way_on(path, config))
    return Start()


def _way_on(path: Path, config: Config) -> str:
    """Returns what to do where a checkpoint cannot be used: one that was asked for by its name is not in the way."""
    is_own = path.parent == Path(str(config.train.run_dir)) / CHECKPOINTS
    if config.checkpoint.resume != "auto" or not is_own:
        return f"one that is restored; or {VALID}"
    return f"one that is restored; or to begin anew, move {path.parent} away, or set another train.run_dir"


def check_writable(run_dir: Path) -> None:
    """Raises UserError where a run folder cannot be made, or not be written to. Writes nothing."""
    present = nearest_existing(run_dir)
    if not present.is_dir():
        raise UserError("train.run_dir", f"{run_dir}: {present} is a file", "a folder, or a path that does not exist")
    if not os.access(present, os.W_OK | os.X_OK):
        raise UserError("train.run_dir", f"{run_dir}: cannot write to {present}", "a folder to write in")
    checkpoints = run_dir / CHECKPOINTS
    if checkpoints.is_symlink() and not checkpoints.is_dir():  # perhaps of a disk that is not mounted
        what = f"{checkpoints} is a link to {checkpoints.readlink()}, which is no folder"
        raise UserError("train.run_dir", what, "a link to a folder, or no link")


def seems_finished(config: Config, start: Start, last_step: int) -> bool:
    """Returns whether the checkpoint of the last step and the exported model exist. Its files are not read.

    Args:
        config: gives the run folder.
        start: the start that `find_start_together` found.
        last_step: the number of steps of the whole run.
    """
    final = Path(str(config.train.run_dir)) / FINAL
    return start.step >= last_step and find_config(final) is not None and any(final.glob("*.safetensors"))


def _named_checkpoints(folder: Path, run_dir: Path, own: list[Path]) -> list[Path]:
    """Returns the checkpoint `folder`, or the checkpoints of the run folder `folder`, newest first.

    If they belong to another run, the run in `run_dir` begins there; if to its own, it goes back to them. Once that is
    done, the run resumes from its newest, so that the same command works again after an interruption.
    """
    if own and _went_back_to(folder, run_dir):
        if own[0].name != folder.name and folder.resolve() != run_dir.resolve():
            done = f"{KEY}: the last start of {run_dir} has gone back to {folder}: resumes from the newest checkpoint"
            say(f"{done}; to go back once more, move the newer ones away")
        return own
    if not folder.is_dir():
        raise UserError(KEY, f"no such folder: {folder}", "auto, never, a run folder or RUN/checkpoints/step-000100")
    named = list(reversed(checkpoints_of(folder))) or [folder]
    if own and not _lies_in(named[0], run_dir):
        say(f"{KEY}: {run_dir} has checkpoints of its own: resumes from the newest of those, not from {named[0]}")
        return own
    return named


def _went_back_to(folder: Path, run_dir: Path) -> bool:
    """Returns whether the last start that wrote to a run folder was asked to resume from `folder`, a checkpoint of the
    run itself, which `checkpoint.keep` may have removed since: those that are newer were written after it.
    """
    last = _config_of(run_dir / CONFIG) if _lies_in(folder, run_dir) else None
    return last is not None and Path(last.checkpoint.resume) == folder


def _lies_in(path: Path, folder: Path) -> bool:
    return own_checkpoint(folder, path) is not None or path.resolve().is_relative_to(folder.resolve())


def lacks_evaluation(run_dir: Path, step: int) -> bool:
    """Returns whether metrics.jsonl lacks the evaluation after `step` steps, before which a run may have stopped."""
    return not any("eval/loss" in line and line["step"] == step for line in read_metrics(run_dir))


def open_run_folder(config: Config, start: Start, origin: Mapping[str, Any]) -> Path:
    """Prepares the run folder for the steps after `start`, and returns it.

    Removes or renames the files of steps that this start will compute again.

    Args:
        config: the config of this start, which is written.
        start: the start that `find_start_together` found.
        origin: the facts of this start (see `dpo.run.provenance`), which are added to provenance.json, with `goes_on`:
            whether it goes on from a checkpoint of the folder itself.
    """
    run_dir = Path(str(config.train.run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    if start.checkpoint:
        say(f"resumes from {start.checkpoint}")
        _log_changes(start.checkpoint.parent.parent / "config.yaml", config)
    goes_on = start.checkpoint is not None and _lies_in(start.checkpoint, run_dir)
    _add_origin(run_dir / PROVENANCE, {**origin, "goes_on": goes_on})
    for name in (FINAL, REPORT) if (run_dir / FINAL).exists() else ():
        _put_aside(run_dir / name)  # a shorter run's: with its model, this run would look finished when interrupted
    newer = newer_checkpoints(run_dir, start.step)
    for path in (*newer, run_dir / TRACKERS) if newer else ():
        _put_aside(path)  # a tracker keeps what it was sent of later steps: it gets a new run
    if goes_on:
        drop_metrics_after(run_dir, start.step)
        drop_evaluations_after(run_dir, start.step)
    else:
        for name in (METRICS, TENSORBOARD, TRACKERS, ANSWERS, EVALUATIONS, NONFINITE, REPORT):
            _put_aside(run_dir / name)
    write_atomically(run_dir / CONFIG, to_yaml(config).encode())  # last: `_went_back_to` believes it
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
        starts = [dict(start) for start in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    except (ValueError, TypeError, RecursionError):
        return None
    return starts if all(type(start.get("first_step", 1)) is int for start in starts) else None


def _log_changes(path: Path, config: Config) -> None:
    before = _config_of(path)
    old, new = _by_key(before or config), _by_key(config)
    for key in new:
        if old[key] != new[key]:
            say(f"changed since the checkpoint: {key}: {old[key]} -> {new[key]}")


def _config_of(path: Path) -> Config | None:
    """Returns the config of a start; None where there is none, or none of this version, which the run does not need."""
    try:
        return load_config(["--config", str(path)], "dpo.train")
    except (OSError, UserError):
        return None


def _by_key(config: Config) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, part in asdict(config).items() for key, value in part.items()}


def _put_aside(path: Path) -> None:
    """Renames `path`, where it exists, to PATH.old or PATH.old-N: it belongs to steps that this run computes again."""
    if path.exists() or path.is_symlink():
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
