"""Checkpoints of a run: all ranks write them, a rename commits them, any number of ranks loads them.

checkpoints/step-000100/             torch's distributed checkpoint: master weights and optimizer state, sharded
                        state.json   the step and the run's identity (see `dpo.run.identity`)
                        COMPLETE     written last: the size of every file, and the hash of the small ones

Until the rename the folder is called step-000100.tmp. So a folder with the final name is complete, and a crash at any
moment leaves the previous checkpoints as they were.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dpo.base.errors import RunError, UserError
from dpo.base.files import remove_folder
from dpo.base.space import describe_full, find_shortage
from dpo.command.exits import line_of
from dpo.distributed.collectives import on_main
from dpo.distributed.copies import fill_copies
from dpo.distributed.failures import storage_errors
from dpo.distributed.world import World
from dpo.terminal.console import say

MARKER = "COMPLETE"
DRAFT = ".tmp"
HASHED_BYTES = 64 * 2**20
"""The marker records the hash of files up to this size, which includes DCP's .metadata (read with pickle)."""


@dataclass(frozen=True)
class RunState:
    """The state of a run apart from its tensors: the number of updates, and the identity that a resume must match."""

    step: int
    identity: dict[str, Any]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Returns the folder of the checkpoint after `step` updates."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


@dataclass(frozen=True)
class Shelf:
    """Names the folder of a run's checkpoints, and the ranks and the group that write them."""

    run_dir: Path
    keep: int | None
    """How many checkpoints to keep, the newest; None: all."""
    plans: str
    """The name under which torch caches the save plans from one checkpoint to the next (see `save_planner`)."""
    world: World
    group: dist.ProcessGroup
    """The process group of all collectives here, so that a thread may write while other threads use other groups."""


def write_checkpoint(shelf: Shelf, state: RunState, tensors: dict[str, Any], before_commit: Callable[[], None]) -> None:
    """Writes a checkpoint, then removes all but the newest `keep`. Every rank must get here, or the rest hang.

    Args:
        shelf: where and by which ranks.
        state: the step and the identity.
        tensors: the tree of `state_tensors`, in host memory.
        before_commit: called on rank 0 when all files are written, before the rename.

    Raises:
        RunError: on every rank, where the checkpoint does not fit on the disk, any rank cannot write its files, or rank
            0 cannot commit them. After a failed write no rank keeps cached plans.
    """
    world, group, plans = shelf.world, shelf.group, shelf.plans
    target = checkpoint_path(shelf.run_dir, state.step)
    draft = target.with_suffix(DRAFT)
    on_main(world, lambda: _make_draft(draft, num_bytes(tensors)), group)
    try:
        with storage_errors(draft):
            # 0: the tensors are in host memory, so DCP must not copy ahead on a stream of the current GPU.
            storage = dcp.FileSystemWriter(draft, per_thread_copy_ahead=0)
            dcp.save(tensors, storage_writer=storage, planner=save_planner(plans), process_group=group)
    except RunError:
        forget_plans(plans)  # if only some ranks had cached plans, the next checkpoint would fail
        if world.is_main:  # the metrics need the room that half a checkpoint takes from a full disk
            with suppress(OSError):  # rank 0 must raise what the other ranks raise
                _remove(draft)
        raise

    def commit() -> None:
        try:
            before_commit()
            _commit(draft, target, state, shelf.keep)
        except OSError as failure:  # names the path: this is reported many steps later
            raise RunError(describe_full(failure, target) or f"{target}: {line_of(failure)}") from failure

    on_main(world, commit, group)


def save_planner(plans: str) -> dcp.DefaultSavePlanner:
    """Returns a planner that caches the plan of the first checkpoint under the name `plans`, and reuses it.

    Without the cache rank 0 gathers, deduplicates and validates the plans of all ranks at every checkpoint. This Python
    code takes longer with more ranks and tensors, and holds the GIL that rank 0's training thread needs. With the cache
    each rank only reports that its tensors are laid out as before; where they are not, all ranks plan again.

    torch caches plans per process in the planner's class, by default under the class's name. So `plans` must be a
    name that no other process group and no other run uses.
    """
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    planner._cached_plans_key = plans
    return planner


def forget_plans(plans: str) -> None:
    """Removes the plans that `save_planner` caches under a name."""
    planner = dcp.DefaultSavePlanner
    caches: tuple[dict[str, Any], ...] = (
        planner._cached_save_plan,
        planner._cached_final_save_plan,
        planner._cached_all_plans,
        planner._cached_global_plan,
        planner._cached_metadata,
    )
    for cache in caches:
        cache.pop(plans, None)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads weights and optimizer state; another number of ranks may have written them. Of several copies of the model
    the first reads (`fill_copies`). Every rank must get here, or the rest hang.

    The optimizer keeps its own settings (learning rate, weight decay, ...), not those of the checkpoint.

    Args:
        folder: a complete checkpoint, RUN/checkpoints/step-000100.
        model: the sharded model, whose weights are overwritten.
        optimizer: of the model's parameters; its state is overwritten.

    Raises:
        RunError: the checkpoint does not fit the model or the optimizer, or cannot be read.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    tensors = state_tensors(model, optimizer)
    load = partial(dcp.load, tensors, checkpoint_id=str(folder))
    fill_copies(_tensors_of(tensors), lambda group: storage_errors(folder)(load)(process_group=group))
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        group.update(wanted)  # the config's settings override the checkpoint's


def _tensors_of(state: Any) -> list[torch.Tensor]:
    """Returns the tensors in nested dicts, in order; the optimizer's settings, which are no tensors, are left out."""
    if isinstance(state, dict):
        return [tensor for part in state.values() for tensor in _tensors_of(part)]
    return [state] if isinstance(state, torch.Tensor) else []


def load_model(folder: Path, model: nn.Module) -> None:
    """Loads the weights of a checkpoint, without optimizer state. Every rank must get here, or the rest hang."""
    state = {"model": model.state_dict()}
    with storage_errors(folder):
        dcp.load(state, checkpoint_id=str(folder))
    model.load_state_dict(state["model"])


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the tensors of a checkpoint, sharded as they are: {"model": weights, "optimizer": optimizer state}."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def num_bytes(tree: Any) -> int:
    """Returns the bytes of all tensors in a tree of dicts and lists; of a DTensor, those of all its shards."""
    if isinstance(tree, dict):
        return sum(map(num_bytes, tree.values()))
    if isinstance(tree, list):
        return sum(map(num_bytes, tree))
    return tree.numel() * tree.element_size() if isinstance(tree, Tensor) else 0


def drafts_of(run_dir: Path) -> list[Path]:
    """Returns the folders of checkpoints that were not completed or not wholly removed; the next save removes them."""
    return list((run_dir / "checkpoints").glob(f"step-*{DRAFT}"))


def _make_draft(draft: Path, num_bytes: int) -> None:
    """Makes the folder of a checkpoint. Raises RunError where `num_bytes` do not fit on the disk."""
    for stale in drafts_of(draft.parent.parent):  # left by a run that was killed while it wrote
        _remove(stale)
    shortage = find_shortage(draft.parent, num_bytes)
    if shortage:
        raise RunError(shortage.message("a checkpoint"))
    draft.mkdir(parents=True)


def _remove(folder: Path) -> None:
    """Removes a checkpoint or a draft; files that cannot be removed now stay in a draft."""
    remove_folder(folder, f"step-{uuid.uuid4().hex}{DRAFT}")


def _commit(draft: Path, target: Path, state: RunState, keep: int | None) -> None:
    (draft / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    marker = draft / MARKER
    marker.write_text(json.dumps(_inventory(draft), indent=1), encoding="utf-8")
    with marker.open() as file:
        os.fsync(file.fileno())
    _remove(target)
    draft.rename(target)
    complete = [path for path in _by_age(target.parent) if _fault(path) is None]
    for old in complete[:-keep] if keep else []:
        _remove(old)


def _inventory(folder: Path) -> dict[str, list[Any]]:
    """Returns file name -> [size in bytes, sha256 or None for large files], without the marker."""
    files = sorted(path for path in folder.iterdir() if path.name != MARKER)
    return {path.name: [path.stat().st_size, _sha256(path)] for path in files}


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size <= HASHED_BYTES else None


def _fault(folder: Path) -> str | None:
    """Returns why a checkpoint cannot be used; None where it is complete and its files are as they were written."""
    marker = folder / MARKER
    if not marker.is_file():
        return f"it is not complete: no {MARKER}"
    try:
        recorded = dict(json.loads(marker.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return f"{MARKER} is broken"
    present = _inventory(folder)
    wrong = [name for name, facts in recorded.items() if present.get(name) != facts]
    return f"{wrong[0]} is missing or has changed" if wrong else None


def _by_age(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, complete or not, by step, oldest first."""
    paths = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(paths, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run, or None; reports the newer ones that it skips, and why."""
    for path in reversed(_by_age(run_dir / "checkpoints")):
        fault = _fault(path)
        if fault is None:
            return path
        say(f"checkpoint {path} is skipped: {fault}")
    return None


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, complete or not; oldest first."""
    return _by_age(run_dir / "checkpoints")


def checkpoints_until(run_dir: Path, step: int) -> list[Path]:
    """Returns the checkpoints of a run up to `step`, complete or not; oldest first."""
    return [path for path in checkpoints_of(run_dir) if _step_of(path) <= step]


def newer_checkpoints(run_dir: Path, step: int) -> list[Path]:
    """Returns the complete checkpoints that are newer than `step`, from which a run resumes; oldest first."""
    return [path for path in _by_age(run_dir / "checkpoints") if _step_of(path) > step and _fault(path) is None]


def read_state(folder: Path, key: str) -> RunState:
    """Returns the step and identity of a checkpoint.

    Raises UserError, with the place `key`, where the folder is not a complete checkpoint.
    """
    fault = _fault(folder)
    if fault is not None:
        raise UserError(key, f"{folder}: {fault}", "a folder RUN/checkpoints/step-000100")
    return RunState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
