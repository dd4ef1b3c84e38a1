"""The folder of a run: what lies in it decides whether a start is fresh, goes on, or has nothing to do.

    see `dpo.run.files` for what it holds

Every function here is for rank 0 alone, which tells the others (`distributed.on_main`).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo.base.console import say
from dpo.base.errors import UserError
from dpo.base.files import write_atomically
from dpo.checkpoint.store import RunState, newer_checkpoints, newest_checkpoint, read_state
from dpo.config import Config, load_config, to_yaml
from dpo.run.files import (
    ANSWERS,
    CONFIG,
    FINAL,
    JOBS,
    METRICS,
    PROVENANCE,
    TENSORBOARD,
    drop_metrics_after,
    read_metrics,
)

KEY = "checkpoint.resume"


@dataclass(frozen=True)
class Start:
    """Where a run begins: from `checkpoint`, after `state.step` updates; both None for a fresh start."""

    checkpoint: Path | None = None
    state: RunState | None = None

    @property
    def step(self) -> int:
        """Updates that were made already."""
        return self.state.step if self.state else 0


def find_start(config: Config) -> Start:
    """What `checkpoint.resume` means for the run folder as it is; writes nothing. Raises UserError."""
    run_dir = Path(str(config.train.run_dir))
    _check_writable(run_dir)
    resume = config.checkpoint.resume
    if resume == "never":
        if run_dir.exists() and any(path.name != JOBS for path in run_dir.iterdir()):
            raise UserError("train.run_dir", f"{run_dir} is not empty", f"a new folder, or {KEY} auto")
        return Start()
    checkpoint = newest_checkpoint(run_dir) if resume == "auto" else _named_checkpoint(Path(resume), run_dir)
    return Start(checkpoint, read_state(checkpoint, KEY)) if checkpoint else Start()


def _check_writable(run_dir: Path) -> None:
    present = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not present.is_dir():
        raise UserError("train.run_dir", f"{run_dir}: {present} is a file", "a folder, or a name that is free")
    if not os.access(present, os.W_OK | os.X_OK):
        raise UserError("train.run_dir", f"{run_dir}: cannot write to {present}", "a folder to write in")


def is_finished(config: Config, start: Start, last_step: int) -> bool:
    """Whether nothing is left to do: the last step's checkpoint is there, and so is the exported model."""
    final = Path(str(config.train.run_dir)) / FINAL
    return start.step >= last_step and (final / "config.json").is_file() and any(final.glob("*.safetensors"))


def _named_checkpoint(folder: Path, run_dir: Path) -> Path:
    """A checkpoint, or the newest one of a run folder.

    One of another run is where `run_dir` begins: once that has checkpoints of its own, it goes on from those, so that
    the same command can be given again after an interruption.
    """
    if not folder.is_dir():
        raise UserError(KEY, f"no such folder: {folder}", "auto, never, a run folder or RUN/checkpoints/step-000100")
    named = newest_checkpoint(folder) or folder
    own = None if _lies_in(named, run_dir) else newest_checkpoint(run_dir)
    if own:
        say(f"{KEY}: {run_dir} has checkpoints of its own: goes on from {own}, not from {named}")
    return own or named


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def lacks_evaluation(run_dir: Path, step: int) -> bool:
    """Whether the evaluation after `step` steps is still to be made: a run may have been stopped just before it."""
    return not any("eval/loss" in line and line["step"] == step for line in read_metrics(run_dir))


def open_run_folder(config: Config, start: Start, origin: Mapping[str, Any]) -> Path:
    """Makes the folder ready for steps after `start`: config and `origin` (see `dpo.run.provenance`) written, what a
    given-up future left put aside.
    """
    run_dir = Path(str(config.train.run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    if start.checkpoint:
        say(f"goes on from {start.checkpoint}")
        _log_changes(start.checkpoint.parent.parent / "config.yaml", config)
    write_atomically(run_dir / CONFIG, to_yaml(config).encode())
    _add_origin(run_dir / PROVENANCE, origin)
    _put_aside(run_dir / "final")  # of a shorter run: if this one is interrupted, it must not look finished
    for checkpoint in newer_checkpoints(run_dir, start.step):
        _put_aside(checkpoint)
    if start.checkpoint and _lies_in(start.checkpoint, run_dir):
        drop_metrics_after(run_dir, start.step)
    else:
        for name in (METRICS, TENSORBOARD, ANSWERS):
            _put_aside(run_dir / name)
    return run_dir


def _add_origin(path: Path, origin: Mapping[str, Any]) -> None:
    """One start more, with a word where the code is not that of the start before."""
    starts = read_starts(path)
    if starts is None:
        _put_aside(path)
        starts = []
    for key in ("version", "commit") if starts else ():
        if starts[-1].get(key) != origin[key]:
            say(f"the code has changed since this run's last start: {key} {starts[-1].get(key)} -> {origin[key]}")
    write_atomically(path, json.dumps([*starts, origin], indent=1).encode())


def read_starts(path: Path) -> list[dict[str, Any]] | None:
    """The starts of a run, oldest first; None where the file is broken: a run does not need its history."""
    try:
        return [dict(start) for start in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    except (ValueError, TypeError):
        return None


def _log_changes(path: Path, config: Config) -> None:
    try:
        before = load_config(["--config", str(path)], "dpo.train")
    except (OSError, UserError):  # of an older version, perhaps: the run itself does not need it
        return
    old, new = _by_key(before), _by_key(config)
    for key in new:
        if old[key] != new[key]:
            say(f"changed since the checkpoint: {key}: {old[key]} -> {new[key]}")


def _by_key(config: Config) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, part in asdict(config).items() for key, value in part.items()}


def _put_aside(path: Path) -> None:
    """Keeps under another name what a run that begins before it would contradict."""
    if path.exists():
        number = next(i for i in range(10**6) if not _old(path, i).exists())
        moved = path.rename(_old(path, number))
        for events in moved.rglob("*tfevents*"):  # by which TensorBoard finds what it shows
            events.rename(events.with_name(events.name.replace("tfevents", "old")))
        say(f"{path} is of an earlier run: moved to {moved}")


def _old(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.old" + (f"-{number}" if number else ""))
