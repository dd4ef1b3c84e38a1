"""Finds checkpoints that cannot be used, before any of them is: whose files are not as they were written, or whose
weights are NaN or infinite and were finite when the run began, which state.json tells.

Of a run with checkpoints of steps 20 and 30 on two ranks:

    rank 0         reads COMPLETE of step 30, compares names and sizes, tells the other rank what it lists
    ranks 0 and 1  hash the files, each its part; one finds that __1_0.distcp has changed
    ranks 0 and 1  do the same for step 20, which is whole
    rank 0         reads state.json of step 20: its weights are finite
    rank 0         reads .metadata of step 20: it names tensors and listed files alone

The files are read once for that; the ranks read the tensors afterwards, from memory where there is room.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from dpo.base.errors import RunError
from dpo.base.units import shown_bytes, shown_seconds
from dpo.checkpoint.marker import (
    MARKER,
    METADATA,
    STATE,
    Inventory,
    damage_of,
    find_change,
    list_files,
    own_files,
    read_marker,
    strays_of,
)
from dpo.checkpoint.metadata import named_files, read_metadata
from dpo.distributed.collectives import all_gather, on_main, together
from dpo.distributed.world import World
from dpo.terminal.console import say

TOLD_SECONDS = 1.0
"""A check that takes longer is told."""
NOT_FINITE = "its weights are NaN or infinite"
"""The fault of a checkpoint from which no step can be made."""


def find_fault(folder: Path) -> str | None:
    """Returns why a checkpoint cannot be used; None where it is complete, its files are as they were written, and its
    weights are finite.

    Reads all of its files, in this process alone; ranks share the work by `find_fault_together`. Raises RunError where
    a file cannot be read for a reason that does not lie in the checkpoint (`marker.damage_of`).
    """
    files, fault = list_files(folder)
    return fault or find_change(folder, files) or _find_lost(folder) or _find_foreign(folder, files)


def find_fault_together(folder: Path, world: World, group: dist.ProcessGroup | None = None) -> str | None:
    """Does the same as `find_fault`, with the files divided over the ranks. Every rank must get here, or the rest hang.

    Args:
        folder: the checkpoint.
        world: all ranks.
        group: a process group of all ranks; None: the default group.

    Raises:
        RunError: on every rank, where a rank cannot read a file for a reason that does not lie in the checkpoint.
    """
    fault = find_change_together(folder, world, group)
    return fault or on_main(world, lambda: _find_foreign(folder, read_marker(folder) or {}), group)


def find_change_together(folder: Path, world: World, group: dist.ProcessGroup | None = None) -> str | None:
    """Does the same as `find_fault_together`, but does not read what .metadata names: for a checkpoint that nobody will
    read now. Every rank must get here, or the rest hang.
    """
    started = time.monotonic()
    files, fault = on_main(world, lambda: list_files(folder), group)
    if fault is not None:
        return fault
    own = {name: files[name] for name in own_files(list(files), world.rank, world.size)}
    found = all_gather(together(lambda: find_change(folder, own), group), group)
    if world.is_main:
        _tell(folder, files, time.monotonic() - started)
    fault = next((fault for fault in found if fault), None)
    return fault or on_main(world, lambda: _find_lost(folder), group)


def first_usable(candidates: Sequence[Path], world: World) -> tuple[Path | None, Mapping[Path, str]]:
    """Returns the first of some checkpoints that can be used, None where there is none, and why those before it cannot
    be used. Rank 0 tells which are skipped. Every rank must get here with the same candidates, or the rest hang.
    """
    faults: dict[Path, str] = {}
    for folder in candidates:
        fault = find_fault_together(folder, world)
        if fault is None:
            return folder, faults
        faults[folder] = fault
        if world.is_main and len(candidates) > 1:
            say(f"checkpoint {folder} is skipped: {fault}")
    return None, faults


def _find_lost(folder: Path) -> str | None:
    """Returns NOT_FINITE where the state of a checkpoint says so. One of another form is refused where it is read whole
    (`state.read_verified_state`).
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    except OSError as failure:
        return damage_of(failure, STATE)
    return NOT_FINITE if isinstance(state, dict) and state.get("finite") is False else None


def _find_foreign(folder: Path, files: Inventory) -> str | None:
    """Returns what in .metadata is not of this checkpoint: names that torch does not write, files that are not listed.
    Its hash must have been compared before.
    """
    try:
        others = named_files(read_metadata(folder)) - files.keys()
    except RunError as failure:
        return str(failure)
    except OSError as failure:
        return damage_of(failure, METADATA)
    return f"{min(others)} is not listed in {MARKER}" if others else None


def _tell(folder: Path, files: Inventory, seconds: float) -> None:
    """Tells how long a check took where that is noticed, which files are not the checkpoint's, and which could not be
    compared by their hash.
    """
    if seconds > TOLD_SECONDS:
        size = shown_bytes(sum(size for size, _ in files.values()))
        say(f"checkpoint {folder}: {size} compared with their hashes in {shown_seconds(seconds)}")
    if strays := strays_of(folder, files):
        say(f"checkpoint {folder}: not of the checkpoint, and not looked at: {', '.join(strays)}")
    unhashed = [name for name, (_, digest) in files.items() if digest is None]
    if unhashed:
        what = f"{len(unhashed)} of its {len(files)} files are over 64 MiB and compared by size alone"
        say(f"checkpoint {folder} was written by an older version: {what}")
