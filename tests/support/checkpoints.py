"""Checkpoints for tests: small ones without a run, planted payloads, markers rewritten to match."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dpo.checkpoint.folders import checkpoint_path, checkpoints_of
from dpo.checkpoint.marker import MARKER, measure, write_marker
from dpo.checkpoint.state import RunState
from dpo.checkpoint.store import Shelf, write_checkpoint
from dpo.checkpoint.verify import find_fault
from dpo.distributed.world import World


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is whole, or None."""
    return next((path for path in reversed(checkpoints_of(run_dir)) if find_fault(path) is None), None)


def shelf_of(run_dir: Path, keep: int | None, world: World) -> Shelf:
    """A shelf on the default group."""
    assert dist.group.WORLD is not None
    return Shelf(run_dir, keep, f"plans of {run_dir}", world, dist.group.WORLD)


def some_tensors(step: int) -> dict[str, Any]:
    """Six tensors, which torch divides over the ranks."""
    return {"model": {f"weight{number}": torch.arange(6.0) + 100 * step + number for number in range(6)}}


def save(shelf: Shelf, step: int) -> Path:
    """Writes a checkpoint with `some_tensors`; its folder."""
    write_checkpoint(shelf, RunState(step, {"seed": 0}), some_tensors(step), lambda: None)
    return checkpoint_path(shelf.run_dir, step)


def remark(folder: Path) -> None:
    """Writes the marker that matches the files as they are now: who plants a file writes the marker too."""
    write_marker(folder, {path.name: measure(path) for path in folder.iterdir() if path.name != MARKER})


def forget_hash(folder: Path, name: str) -> None:
    """Leaves the size of a file alone in the marker, as older versions did for files over 64 MiB."""
    files = json.loads((folder / MARKER).read_text())
    files[name][1] = None
    (folder / MARKER).write_text(json.dumps(files))


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Payload:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


def read_plainly(folder: Path) -> Any:
    """The metadata of a checkpoint, as torch reads it."""
    return pickle.loads((folder / ".metadata").read_bytes())


def save_plainly(folder: Path, state: dict[str, Any]) -> None:
    """Writes a state with torch alone, objects too."""
    dcp.save(state, checkpoint_id=str(folder))
