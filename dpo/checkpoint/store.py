"""Checkpoints of a run: all ranks write them, a rename commits them, any number of ranks loads them.

checkpoints/step-000100/             torch's distributed checkpoint: master weights and optimizer state, sharded
                        state.json   the step, the run's identity (see `dpo.run.identity`), the weights' hash
                                     and whether they are finite
                        COMPLETE     written last: the size and the hash of every file

Until the rename the folder is called step-000100.tmp. So a folder with the final name is complete, and a crash at any
moment leaves the previous checkpoints as they were. All that a checkpoint consists of is on the disk, with its name,
before an older one is removed.
"""

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from dpo.base.errors import RunError
from dpo.base.files import replace_folder, sync, sync_tree, write_file
from dpo.base.space import describe_full, find_shortage
from dpo.checkpoint.fingerprint import fingerprint
from dpo.checkpoint.folders import (
    DRAFT,
    checkpoint_path,
    draft_name,
    drafts_of,
    marker_of,
    own_checkpoint,
    remove_checkpoint,
    remove_older,
)
from dpo.checkpoint.marker import METADATA, STATE, Inventory, measure, own_files, write_marker
from dpo.checkpoint.metadata import open_reader
from dpo.checkpoint.plans import forget_plans, save_planner
from dpo.checkpoint.state import RunState
from dpo.checkpoint.verify import NOT_FINITE
from dpo.command.exits import line_of
from dpo.distributed.collectives import all_gather, on_main, together
from dpo.distributed.copies import fill_copies
from dpo.distributed.world import World
from dpo.model.weights import are_finite
from dpo.terminal.console import warn
from dpo.watch.failures import storage_errors


def do_nothing() -> None:
    """Takes the place of a check of the lock where no lock is held."""


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
    known: dict[str, bytes | None] = field(default_factory=dict)
    """Of the checkpoints that this process wrote or verified: name -> marker; None: damaged, or not finite."""
    check_lock: Callable[[], None] = do_nothing
    """Called on rank 0 before a draft is removed, which another start may be writing. Raises FolderLost."""
    began_finite: bool = True
    """Whether all weights were finite when this process began: some models have NaN in rows that nobody uses."""


def open_shelf(
    run_dir: Path,
    keep: int | None,
    world: World,
    seconds: int,
    verified: Path | None = None,
    check_lock: Callable[[], None] = do_nothing,
) -> Shelf:
    """Returns the shelf of a run, with a process group of its own. Every rank must get here, or the rest hang.

    Args:
        run_dir: the run folder.
        keep: how many checkpoints to keep, the newest; None: all.
        world: all ranks.
        seconds: the timeout of the collectives.
        verified: the checkpoint that was found whole at the start of this process, if any.
        check_lock: raises FolderLost, on rank 0, where another start has taken the run folder.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    known = on_main(world, lambda: _known(run_dir, verified)) if verified else {}
    return Shelf(run_dir, keep, uuid.uuid4().hex, world, group, known, check_lock)


def _known(run_dir: Path, verified: Path) -> dict[str, bytes | None]:
    own = own_checkpoint(run_dir, verified)
    return {own.name: marker_of(own)} if own else {}


def write_checkpoint(shelf: Shelf, state: RunState, tensors: dict[str, Any], before_commit: Callable[[], None]) -> None:
    """Writes a checkpoint, then removes all but the newest `keep`. Every rank must get here, or the rest hang.

    Args:
        shelf: where and by which ranks.
        state: the step and the identity.
        tensors: the tree of `state_tensors`, in host memory.
        before_commit: called on rank 0 when all files are written, before the rename.

    Raises:
        RunError: on every rank, where the checkpoint does not fit on the disk, any rank cannot write its files, rank 0
            cannot commit them, or another start has taken the run folder. After a failed write no rank keeps cached
            plans.
    """
    world, group, plans = shelf.world, shelf.group, shelf.plans
    target = checkpoint_path(shelf.run_dir, state.step)
    draft = target.with_suffix(DRAFT)
    on_main(world, lambda: _make_draft(draft, num_bytes(tensors), shelf.check_lock), group)
    try:
        with storage_errors(draft, num_bytes(tensors)):
            # 0: the tensors are in host memory, so DCP must not copy ahead on a stream of the current GPU.
            storage = dcp.FileSystemWriter(draft, per_thread_copy_ahead=0)
            dcp.save(tensors, storage_writer=storage, planner=save_planner(plans), process_group=group)
        files = _measure_together(draft, world, group)
    except RunError:
        forget_plans(plans)  # if only some ranks had cached plans, the next checkpoint would fail
        if world.is_main:  # the metrics need the room that half a checkpoint takes from a full disk
            with suppress(OSError):  # FolderLost too: rank 0 must raise what the other ranks raise
                shelf.check_lock()
                remove_checkpoint(draft)
        raise
    is_lost = shelf.began_finite and not all(all_gather(are_finite(tensors["model"].values()), group))
    written = replace(state, weights=fingerprint(tensors["model"], group), finite=not is_lost)

    def commit() -> None:
        try:
            before_commit()
            _commit(draft, target, written, files)
            shelf.known[target.name] = None if is_lost else marker_of(target)
        except OSError as failure:  # names the path: this is reported many steps later
            raise RunError(describe_full(failure, target) or f"{target}: {line_of(failure)}") from failure

    on_main(world, commit, group)
    if is_lost and world.is_main:
        warn(f"checkpoint {target} does not count for checkpoint.keep: {NOT_FINITE}")
    remove_older(target.parent, shelf.keep, shelf.known, world, group)


def _measure_together(draft: Path, world: World, group: dist.ProcessGroup) -> Inventory:
    """Returns sizes and hashes of the files that all ranks have written; each rank reads its own, from memory.

    Every rank must get here, or the rest hang.
    """

    def measure_own() -> Inventory:
        names = [path.name for path in draft.iterdir() if path.name == METADATA or path.name[0] != "."]
        return {name: measure(draft / name) for name in own_files(names, world.rank, world.size)}

    parts = all_gather(together(measure_own, group), group)
    return {name: facts for part in parts for name, facts in part.items()}


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
    tensors, settings = _split_state(model, optimizer)
    reader = together(lambda: open_reader(folder))
    load = partial(dcp.load, tensors, storage_reader=reader)
    fill_copies(_tensors_of(tensors), lambda group: storage_errors(folder)(load)(process_group=group))
    state, options = tensors["optimizer"] | settings, StateDictOptions(strict=not has_frozen(model))
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=state, options=options)


def _tensors_of(state: Any) -> list[torch.Tensor]:
    """Returns the tensors in nested dicts, in order."""
    if isinstance(state, dict):
        return [tensor for part in state.values() for tensor in _tensors_of(part)]
    return [state] if isinstance(state, torch.Tensor) else []


def load_model(folder: Path, model: nn.Module) -> None:
    """Loads the weights of a checkpoint, without optimizer state. Every rank must get here, or the rest hang."""
    state = {"model": trained_part(model, get_model_state_dict(model))}
    reader = together(lambda: open_reader(folder))
    with storage_errors(folder):
        dcp.load(state, storage_reader=reader)
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=not has_frozen(model)))


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the tensors of a checkpoint, sharded as they are: {"model": weights, "optimizer": {"state": state}}.

    There is nothing else in it: of what is no tensor, torch would write a pickle, and call what is named there when it
    reads it.
    """
    return _split_state(model, optimizer)[0]


def _split_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the tensors of a checkpoint, and the settings of the optimizer, {"param_groups": [...]}."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    settings = {"param_groups": optimizer_state.pop("param_groups")}
    return {"model": trained_part(model, model_state), "optimizer": optimizer_state}, settings


def has_frozen(model: nn.Module) -> bool:
    """Returns whether some parameters of a model are not trained, as those of the base of adapters."""
    return not all(parameter.requires_grad for parameter in model.parameters())


def trained_part(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a model's state that a checkpoint holds: of a model with adapters what is trained, since each
    start reads the rest from the folder of the model.
    """
    if not has_frozen(model):
        return state
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trained}


def num_bytes(tree: Any) -> int:
    """Returns the bytes of all tensors in a tree of dicts and lists; of a DTensor, those of all its shards."""
    if isinstance(tree, dict):
        return sum(map(num_bytes, tree.values()))
    if isinstance(tree, list):
        return sum(map(num_bytes, tree))
    return tree.numel() * tree.element_size() if isinstance(tree, Tensor) else 0


def _make_draft(draft: Path, num_bytes: int, check_lock: Callable[[], None]) -> None:
    """Makes the folder of a checkpoint. Raises RunError where `num_bytes` do not fit on the disk, and FolderLost where
    another start has taken the run folder, and may be writing the drafts that lie there.
    """
    check_lock()
    for stale in drafts_of(draft.parent.parent):  # left by a run that was killed while it wrote
        remove_checkpoint(stale)
    shortage = find_shortage(draft.parent, num_bytes)
    if shortage:
        raise RunError(shortage.message("a checkpoint"))
    draft.mkdir(parents=True)


def _commit(draft: Path, target: Path, state: RunState, files: Inventory) -> None:
    """Writes state and marker, and gives the checkpoint its name, which is then on the disk."""
    write_file(draft / STATE, json.dumps(asdict(state), indent=1).encode())
    write_marker(draft, files | {STATE: measure(draft / STATE)})
    sync_tree(draft)
    replace_folder(draft, target, draft_name())
    sync(target.parent.parent)
