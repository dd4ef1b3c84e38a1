"""Lists the checkpoints of a run, and removes those that are not kept.

With `checkpoint.keep` 2, in the process that has just written step 40:

    step-000040   written by this process: good         kept
    step-000030   damaged since this process wrote it   does not count; older than the newest, so it stays for now
    step-000020   of an earlier start                   its files are compared with their hashes now: good, kept
    step-000010   older than the newest two good ones   removed
"""

import re
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist

from dpo.base.errors import RunError
from dpo.base.files import remove_folder
from dpo.checkpoint.marker import MARKER, list_files
from dpo.checkpoint.verify import NOT_FINITE, find_change_together
from dpo.command.exits import line_of
from dpo.distributed.collectives import on_main
from dpo.distributed.world import World
from dpo.terminal.console import say, warn

DRAFT = ".tmp"
CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step-[0-9]+")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Returns the folder of the checkpoint after `step` updates."""
    return run_dir / CHECKPOINTS / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """Returns the number of updates before a checkpoint."""
    return int(path.name.removeprefix("step-"))


def bears_step(path: Path) -> bool:
    """Returns whether a folder has the name of a checkpoint of a run; a copy may have any other."""
    return _NAME.fullmatch(path.name) is not None


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, whole or damaged; oldest first."""
    return _by_age(run_dir / CHECKPOINTS)


def _by_age(folder: Path) -> list[Path]:
    """Returns the folders `step-NUMBER` in a folder, and links of that name, wherever they lead; oldest first."""
    paths = [path for path in folder.iterdir() if bears_step(path)] if folder.is_dir() else []
    return sorted([path for path in paths if path.is_dir() or path.is_symlink()], key=step_of)


def own_checkpoint(run_dir: Path, path: Path) -> Path | None:
    """Returns the checkpoint of a run that lies at `path`, however that is spelt and whichever is a link; None: it is
    none of this run.
    """
    present = [own for own in checkpoints_of(run_dir) if own.exists() and path.exists()]
    return next((own for own in present if own.samefile(path)), None)


def checkpoints_until(run_dir: Path, step: int) -> list[Path]:
    """Returns the checkpoints of a run up to `step`, whole or damaged; oldest first."""
    return [path for path in checkpoints_of(run_dir) if step_of(path) <= step]


def newer_checkpoints(run_dir: Path, step: int) -> list[Path]:
    """Returns the checkpoints of a run after `step`, whole or damaged; oldest first."""
    return [path for path in checkpoints_of(run_dir) if step_of(path) > step]


def drafts_of(run_dir: Path) -> list[Path]:
    """Returns the folders of checkpoints that were not completed or not wholly removed; the next save removes them."""
    return list((run_dir / CHECKPOINTS).glob(f"step-*{DRAFT}"))


def draft_name() -> str:
    """Returns a new name for a folder that is to be removed."""
    return f"step-{uuid.uuid4().hex}{DRAFT}"


# --- removed ---------------------------------------------------------------------------------------------------------


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint or a draft; files that cannot be removed now stay in a draft. Of a link the link alone is
    removed, which is told.
    """
    if folder.is_symlink():
        say(f"{folder} is a link: the link is removed, its files stay in {folder.readlink()}")
    remove_folder(folder, draft_name())


def marker_of(folder: Path) -> bytes:
    """Returns the content of a checkpoint's marker, by which this process knows it again."""
    return (folder / MARKER).read_bytes()


def remove_older(
    folder: Path, keep: int | None, known: dict[str, bytes | None], world: World, group: dist.ProcessGroup
) -> None:
    """Removes the checkpoints that are older than the newest `keep` good ones; damaged ones do not count, nor do those
    whose weights are not finite.

    Of those that this process has written or verified, marker and sizes must be as they were. The others are compared
    with their hashes, once each, where an older one would be removed. What cannot be removed is told, and nothing is
    removed where one of them cannot be read now. Every rank must get here, or the rest hang.

    Args:
        folder: RUN/checkpoints.
        keep: how many to keep; None: all.
        known: on rank 0: name -> marker; None: damaged, or not finite. It is extended.
        world: all ranks.
        group: a process group of all ranks.
    """
    try:
        while doubtful := on_main(world, lambda: _first_unknown(folder, keep, known), group):
            fault = find_change_together(doubtful, world, group)
            on_main(world, partial(_note, doubtful, fault, known), group)
        on_main(world, lambda: _remove(_too_old(folder, keep, known)), group)
    except RunError as failure:  # on every rank alike; the next save tries again
        if world.is_main:
            warn(f"old checkpoints are not removed now: {failure}")


def _note(path: Path, fault: str | None, known: dict[str, bytes | None]) -> None:
    """Adds a checkpoint to those that are known, and tells where it does not count."""
    known[path.name] = None if fault else marker_of(path)
    if fault:
        damaged = "" if fault == NOT_FINITE else "is damaged, and "
        warn(f"checkpoint {path} {damaged}does not count for checkpoint.keep: {fault}")


def _first_unknown(folder: Path, keep: int | None, known: dict[str, bytes | None]) -> Path | None:
    """Returns the newest checkpoint that must be verified before older ones may be removed; None: all are known."""
    good = 0
    for path in reversed(_by_age(folder)[1:]):  # the oldest need not be known: none is older
        if keep is None or good == keep:
            return None
        if path.name not in known:
            return path
        good += _is_good(path, known)
    return None


def _too_old(folder: Path, keep: int | None, known: dict[str, bytes | None]) -> list[Path]:
    paths = _by_age(folder)
    good = [number for number, path in enumerate(paths) if _is_good(path, known)]
    return paths[: good[-keep]] if keep is not None and len(good) >= keep else []


def _is_good(path: Path, known: dict[str, bytes | None]) -> bool:
    """Returns whether a checkpoint is as this process has written or verified it, as far as marker and sizes tell."""
    marker = known.get(path.name)
    return marker is not None and list_files(path)[1] is None and marker_of(path) == marker


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            remove_checkpoint(path)
        except OSError as failure:
            warn(f"an old checkpoint cannot be removed: {path}: {line_of(failure)}")
