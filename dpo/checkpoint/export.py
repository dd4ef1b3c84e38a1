"""Writes a trained policy as a model folder that transformers loads."""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpo.base.errors import RunError
from dpo.base.files import naming, remove_folder, replace_folder, sync_tree, write_atomically
from dpo.base.space import find_shortage
from dpo.checkpoint.companions import write_companions, write_companions_of_adapters
from dpo.checkpoint.export_adapters import num_bytes, save_adapters, write_adapter_config
from dpo.checkpoint.export_dtype import adapters_dtype, export_dtype
from dpo.checkpoint.final_sums import README, write_sums_together
from dpo.command.exits import line_of
from dpo.config import Config
from dpo.distributed.collectives import on_main
from dpo.distributed.world import World
from dpo.model.build import merged_tensors, stored_tensors
from dpo.model.policy import Policy
from dpo.model.weights import save_tensors
from dpo.terminal.console import warn


@dataclass(frozen=True)
class Finish:
    """What rank 0 calls while a model is exported."""

    card: Callable[[Path], str]
    """Returns the text of the model card, README.md, given the folder with all other files. Where it fails, the model
    is exported without a card, with a warning.
    """
    check_lock: Callable[[], None] = lambda: None
    """Called before an earlier draft is removed, and before the folder gets its name: raises FolderLost where another
    start, whose draft it may be, has taken the run folder.
    """


@dataclass(frozen=True)
class Content:
    """The files of an exported model but for its card and SHA256SUMS."""

    num_bytes: int
    """The bytes that `save` has on disk at its peak."""
    save: Callable[[Path], None]
    """Writes the tensors to a folder; called on every rank."""
    complete: Callable[[Path], None]
    """Writes all other files; called on rank 0."""


def export(policy: Policy, model_folder: Path, out: Path, config: Config, world: World, finish: Finish) -> None:
    """Writes a trained policy to the folder `out`: weights, config, tokenizer, chat template, generation config, own
    code, licence and a model card; of a policy with adapters these alone, in peft's form, with the tokenizer.

    The folder gets its name when it is complete and on the disk; SHA256SUMS in it lists its files. Every rank must get
    here, or the rest hang.

    Args:
        policy: the sharded model.
        model_folder: the folder of the model from which the policy started.
        out: the new folder; an existing one is replaced.
        config: gives `checkpoint.export_dtype` (see `export_dtype.export_dtype`) and the tokenizer.
        world: all ranks.
        finish: what rank 0 calls.

    Raises:
        RunError: on every rank, where the model does not fit on the disk, a rank cannot write, or another start has
            taken the run folder.
    """
    if policy.adapters:
        content = _adapters(policy, model_folder, config, world)
    else:
        content = _model(policy, stored_tensors(policy), model_folder, config, world)
    _write(content, out, world, finish)


def export_merged(policy: Policy, model_folder: Path, out: Path, config: Config, world: World, finish: Finish) -> None:
    """Writes a policy whose adapters are added to the weights that they adapt, as a whole model; see `export`. Every
    rank must get here, or the rest hang.
    """
    _write(_model(policy, merged_tensors(policy), model_folder, config, world), out, world, finish)


def _model(policy: Policy, tensors: Mapping[str, Tensor], folder: Path, config: Config, world: World) -> Content:
    """Returns the content of the folder of a whole model. Every rank must get here, or the rest hang."""
    dtype = on_main(world, lambda: export_dtype(config.checkpoint, folder))
    return Content(
        _written_bytes(tensors, dtype),
        save=lambda draft: save_tensors(draft, tensors, dtype, world),
        complete=lambda draft: write_companions(draft, folder, config, policy.model, dtype),
    )


def _adapters(policy: Policy, folder: Path, config: Config, world: World) -> Content:
    """Returns the content of a folder of adapters."""

    def complete(draft: Path) -> None:
        write_adapter_config(draft, policy, config.model.path)
        write_companions_of_adapters(draft, folder, config)

    dtype = adapters_dtype(config.checkpoint)
    return Content(num_bytes(policy.model, dtype), lambda draft: save_adapters(draft, policy, dtype, world), complete)


def _write(content: Content, out: Path, world: World, finish: Finish) -> None:
    """Writes an exported model to `out`. Every rank must get here, or the rest hang."""
    draft = draft_of(out)
    on_main(world, lambda: _make_draft(draft, content.num_bytes, finish.check_lock))
    content.save(draft)

    def complete() -> None:
        with naming(out, content.num_bytes):
            content.complete(draft)
        _write_card(draft, finish.card)

    on_main(world, complete)
    write_sums_together(draft, world)

    def commit() -> None:
        sync_tree(draft)
        finish.check_lock()
        replace_folder(draft, out, _spare_name())

    on_main(world, commit)


def _spare_name() -> str:
    return f".{uuid.uuid4().hex}.draft"


def _write_card(folder: Path, card: Callable[[Path], str]) -> None:
    """Writes README.md, the model card, into the folder of a model; warns where that fails."""
    try:
        write_atomically(folder / README, card(folder).encode(errors="replace"))  # a path may hold any byte
    except Exception as failure:  # of any kind: a card is not worth a model
        warn(f"the exported model has no {README}: {line_of(failure)}")


def draft_of(out: Path) -> Path:
    """Returns the folder that becomes the exported model `out`; a killed export leaves it behind."""
    return out.with_name(f".{out.name}.draft")


def _written_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """Returns the bytes that `save_tensors` has on disk at its peak: of the shards of all ranks, and of the files that
    these are joined to.
    """
    sizes = [
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.element_size())
        for tensor in tensors.values()
    ]
    return 2 * sum(sizes)


def _make_draft(draft: Path, num_bytes: int, check_lock: Callable[[], None]) -> None:
    """Makes an empty folder for an exported model. Raises RunError where `num_bytes` do not fit on the disk, and
    FolderLost where the draft that lies there may be another start's.
    """
    check_lock()
    remove_folder(draft, _spare_name())
    shortage = find_shortage(draft.parent, num_bytes)
    if shortage:
        raise RunError(shortage.message("the exported model, and its shards from which it is joined,"))
    draft.mkdir(parents=True)
