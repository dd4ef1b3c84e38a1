"""Writes a trained policy as a model folder that transformers loads."""

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dpo.base.console import say
from dpo.base.errors import RunError, UserError
from dpo.base.files import remove_folder
from dpo.base.space import find_shortage
from dpo.config import Config
from dpo.data.tokenizer import has_tokenizer, load_tokenizer
from dpo.distributed.collectives import on_main
from dpo.distributed.world import World
from dpo.model.build import stored_tensors
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy
from dpo.model.weights import save_tensors


def export(policy: Policy, model_folder: Path, out: Path, config: Config, world: World) -> None:
    """Writes weights, config, tokenizer, chat template and generation config to the folder `out`.

    The folder gets its name when it is complete. Every rank must get here, or the rest hang.

    Args:
        policy: the sharded model.
        model_folder: the folder of the model from which the policy started.
        out: the new folder; an existing one is replaced.
        config: gives `checkpoint.export_dtype` and the tokenizer.
        world: all ranks.

    Raises:
        RunError: on every rank, where the model does not fit on the disk, or a rank cannot write.
    """
    dtype = getattr(torch, config.checkpoint.export_dtype)
    draft = draft_of(out)
    tensors = stored_tensors(policy)
    on_main(world, lambda: _make_draft(draft, _written_bytes(tensors, dtype)))
    save_tensors(draft, tensors, dtype, world)
    on_main(world, lambda: _complete(draft, out, model_folder, config, dtype))


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


def _make_draft(draft: Path, num_bytes: int) -> None:
    """Makes an empty folder for an exported model. Raises RunError where `num_bytes` do not fit on the disk."""
    remove_folder(draft, f".{uuid.uuid4().hex}.draft")
    shortage = find_shortage(draft.parent, num_bytes)
    if shortage:
        raise RunError(shortage.message("the exported model, and its shards from which it is joined,"))
    draft.mkdir(parents=True)


def _complete(draft: Path, out: Path, model_folder: Path, config: Config, dtype: torch.dtype) -> None:
    model_config = read_model_config(model_folder, config.model.trust_remote_code)
    model_config.dtype = dtype
    model_config.save_pretrained(draft)
    generation = model_folder / "generation_config.json"
    if generation.is_file():  # copied: transformers refuses to save some configs that it loads
        shutil.copyfile(generation, draft / generation.name)
    _save_tokenizer(config.model.tokenizer or str(model_folder), draft, config.model.trust_remote_code)
    remove_folder(out, f".{uuid.uuid4().hex}.draft")
    draft.replace(out)


def _save_tokenizer(path: str, draft: Path, trust_remote_code: bool) -> None:
    """Saves the tokenizer, unless a local model has none: data in `format: tokens` does not need it."""
    if Path(path).is_dir() and not has_tokenizer(Path(path)):
        return
    try:
        load_tokenizer(path, trust_remote_code).save_pretrained(draft)
    except UserError as failure:  # the run used token ids; its model is exported without a tokenizer
        say(f"the exported model has no tokenizer: {failure}")
