"""Checkpoints of a run: written by all ranks, committed by one rename, checked, found again, loaded on any number of
ranks.

checkpoints/step-000100/   torch's distributed checkpoint: master weights and optimizer state, sharded
             state.json    the step and the run's identity (see `dpo.run.folder`)
             COMPLETE      written last: the size of every file, and the hash of the small ones
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dpo.base.command import line_of
from dpo.base.console import say
from dpo.base.errors import RunError, UserError
from dpo.distributed.collectives import on_main
from dpo.distributed.failures import storage_errors
from dpo.distributed.world import World

MARKER = "COMPLETE"
DRAFT = ".tmp"
HASHED_BYTES = 64 * 2**20
"""Files up to this size are hashed whole in the marker (DCP's .metadata is one: it is read with pickle)."""


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds beside tensors: `step` updates were made; `identity` may not change on resume."""

    step: int
    identity: dict[str, Any]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


@dataclass(frozen=True)
class Shelf:
    """Where the checkpoints of a run go, and the ranks that write them."""

    run_dir: Path
    keep: int | None
    """How many are kept, the newest ones; None: all."""
    plans: str
    """Names what is kept in memory from one checkpoint to the next (see `save_planner`)."""
    world: World
    group: dist.ProcessGroup
    """All exchanges go over it, so that a thread may write while others use other groups."""


def write_checkpoint(shelf: Shelf, state: RunState, tensors: dict[str, Any], before_commit: Callable[[], None]) -> None:
    """Writes a checkpoint of `state_tensors` in host memory, then removes all but the newest `keep`.

    It is written under another name and renamed when it is whole, after `before_commit` on rank 0: a folder with the
    right name is always complete. Every rank must get here, or the rest hang. Raises RunError, on every rank and with
    no plans kept, where any cannot write.
    """
    world, group, plans = shelf.world, shelf.group, shelf.plans
    target = checkpoint_path(shelf.run_dir, state.step)
    draft = target.with_suffix(DRAFT)
    on_main(world, lambda: _make_draft(draft), group)
    try:
        with storage_errors(draft):
            # The tensors are in host memory: nothing is copied ahead from a device, on a stream of which GPU ever.
            storage = dcp.FileSystemWriter(draft, per_thread_copy_ahead=0)
            dcp.save(tensors, storage_writer=storage, planner=save_planner(plans), process_group=group)
    except RunError:
        forget_plans(plans)  # some may be kept and others not: the next checkpoint would fail of it
        raise

    def commit() -> None:
        try:
            before_commit()
            _commit(draft, target, state, shelf.keep)
        except OSError as failure:  # told when the run is many steps further
            raise RunError(f"{target}: {line_of(failure)}") from failure

    on_main(world, commit, group)


def save_planner(plans: str) -> dcp.DefaultSavePlanner:
    """A planner that keeps, under the name `plans`, what the ranks agreed on at the first checkpoint: at the next ones
    each rank says that its tensors lie as they did, and rank 0 gathers, deduplicates and validates nothing: Python
    that takes longer the more ranks and tensors there are, and beside which rank 0's training thread would hardly run.

    torch keeps plans for all planners of a class, in the process, by the class's name, whatever the ranks and the run:
    `plans` must belong to one group and one run. Where tensors do change, all is planned anew.
    """
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    planner._cached_plans_key = plans
    return planner


def forget_plans(plans: str) -> None:
    """Frees what `save_planner` keeps under a name."""
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
    """Reads weights and optimizer state, whatever the number of ranks that wrote them. Every rank must get here.

    The optimizer's settings stay those it was made with. Raises RunError where the checkpoint does not fit.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    tensors = state_tensors(model, optimizer)
    with storage_errors(folder):
        dcp.load(tensors, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        group.update(wanted)  # weight decay and the like are those of the config, which may have changed


def load_model(folder: Path, model: nn.Module) -> None:
    """Reads the weights of a checkpoint alone. Every rank must get here."""
    state = {"model": model.state_dict()}
    with storage_errors(folder):
        dcp.load(state, checkpoint_id=str(folder))
    model.load_state_dict(state["model"])


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds: the weights and the optimizer's state, as they lie on the ranks."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _make_draft(draft: Path) -> None:
    for stale in draft.parent.glob(f"step-*{DRAFT}"):  # of a run that was killed while it wrote
        shutil.rmtree(stale, ignore_errors=True)
    draft.mkdir(parents=True)


def _commit(draft: Path, target: Path, state: RunState, keep: int | None) -> None:
    (draft / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    marker = draft / MARKER
    marker.write_text(json.dumps(_inventory(draft), indent=1), encoding="utf-8")
    with marker.open() as file:
        os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    complete = [path for path in _by_age(target.parent) if _fault(path) is None]
    for old in complete[:-keep] if keep else []:
        shutil.rmtree(old)


def _inventory(folder: Path) -> dict[str, list[Any]]:
    """File name -> [size, sha256 or None for large files]."""
    files = sorted(path for path in folder.iterdir() if path.name != MARKER)
    return {path.name: [path.stat().st_size, _sha256(path)] for path in files}


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size <= HASHED_BYTES else None


def _fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used; None where it is complete and its files are as they were written."""
    marker = folder / MARKER
    if not marker.is_file():
        return f"it is not complete: no {MARKER}"
    try:
        recorded = dict(json.loads(marker.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return f"{MARKER} is broken"
    found = _inventory(folder)
    wrong = [name for name, facts in recorded.items() if found.get(name) != facts]
    return f"{wrong[0]} is missing or not as it was written" if wrong else None


def _by_age(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    paths = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(paths, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; says which newer ones it passed over and why."""
    for path in reversed(_by_age(run_dir / "checkpoints")):
        fault = _fault(path)
        if fault is None:
            return path
        say(f"checkpoint {path} is passed over: {fault}")
    return None


def newer_checkpoints(run_dir: Path, step: int) -> list[Path]:
    """The complete checkpoints of a run after `step` updates, oldest first: of a future that another start gives up."""
    return [path for path in _by_age(run_dir / "checkpoints") if _step_of(path) > step and _fault(path) is None]


def read_state(folder: Path, key: str) -> RunState:
    """The step and identity of a checkpoint. Raises UserError, naming the config `key`, where it is not a complete
    one.
    """
    fault = _fault(folder)
    if fault is not None:
        raise UserError(key, f"{folder}: {fault}", "a folder RUN/checkpoints/step-000100")
    return RunState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
