"""Matches the tensors of a model with the tensors in the files of its folder, by name, shape and dtype."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dpo.adapters.names import base_name, is_of_adapter
from dpo.adapters.nf4_linear import stand_in
from dpo.adapters.quantized import quantized_layers
from dpo.base.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights in full or half precision, as safetensors calls them."""
OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.masked_bias$", r"attention\.masked_bias$")
"""Buffers that older versions of transformers stored, and that every model computes from its config."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of a folder."""

    file: Path
    shape: torch.Size
    dtype: str
    """As safetensors calls it: F32, BF16, F8_E4M3."""


Stored = Mapping[str, StoredTensor]
"""The tensors in a folder, by name."""


@dataclass(frozen=True)
class Names:
    """The names of a model's tensors in the files of a folder."""

    model: str
    """The name of the model's class, for messages."""
    body_prefix: str
    """The name of the body with a dot. Files of a body alone lack it in their names."""
    tied: Mapping[str, str]
    """The name of each tensor that shares the values of another -> the name of the other."""
    tieable: Mapping[str, str]
    """The same of tensors that the class shares where the config says so, and this config does not."""
    ignored: Sequence[str]
    """Patterns of names that the class expects in files of other forms, and does not load."""


@dataclass(frozen=True)
class Match:
    """The tensors of a model by their names in a folder."""

    tensors: Mapping[str, torch.Tensor]
    unused: Sequence[str]
    """The names in the folder for which the model has no tensor, sorted, without those that are harmless."""


# --- names -----------------------------------------------------------------------------------------------------------


def names_of(model: PreTrainedModel) -> Names:
    """Returns the names of a model's tensors in its Hugging Face folder."""
    own = base_state(model)
    by_class = model._tied_weights_keys or {}
    tied = model.all_tied_weights_keys
    tieable = {one: other for one, other in by_class.items() if one in own and other in own and not tied}
    return Names(
        model=type(model).__name__.removeprefix("FSDP"),
        body_prefix=f"{model.base_model_prefix}.",
        tied=_stored(model, tied),
        tieable=_stored(model, tieable),
        ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
    )


def base_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns a model's tensors without its adapters, by their names in the same model without adapters. In place of a
    quantized weight it returns a tensor without memory; see `dpo.adapters.nf4_linear.stand_in`.
    """
    quantized = {name: stand_in(layer) for name, layer in quantized_layers(model).items()}
    packed = {name.removesuffix("weight") + "packed" for name in quantized}
    own = {base_name(name): tensor for name, tensor in model.state_dict().items() if not is_of_adapter(name)}
    return {name: tensor for name, tensor in own.items() if name not in packed} | quantized


def _stored(model: PreTrainedModel, pairs: Mapping[str, str]) -> dict[str, str]:
    """Returns pairs of names as they are in the model's folder."""
    state = base_state(model)

    def stored(name: str) -> str:
        return str(next(iter(revert_weight_conversion(model, {name: state[name]}))))

    return {stored(one): stored(other) for one, other in pairs.items()}


def stored_name(name: str, stored: Stored, body_prefix: str) -> str:
    """Returns the name of a tensor in a folder, without the name of the body where only that is stored."""
    bare = name.removeprefix(body_prefix)
    return bare if name not in stored and bare in stored else name


# --- matched ---------------------------------------------------------------------------------------------------------


def match(folder: Path, stored: Stored, tensors: Mapping[str, torch.Tensor], names: Names) -> Match:
    """Returns the tensors of a model by their names in a folder, and the names of the folder that are left over.

    Args:
        folder: the folder, for errors.
        stored: its tensors.
        tensors: the tensors of the model by name; tied tensors once.
        names: the names of the model's tensors.

    Raises:
        UserError: a tensor is missing, has another shape, or is quantized.
    """
    wanted = {_name_in(stored, name, names): tensor for name, tensor in tensors.items()}
    missing = sorted(set(wanted) - set(stored))
    if missing:
        what = f"{len(missing)} tensors of the model are missing, the first is {missing[0]}"
        is_head = set(missing) <= set(names.tieable)
        raise UserError(
            str(folder), what, "tie_word_embeddings true in config.json, if it is shared" if is_head else ""
        )
    for name, tensor in wanted.items():
        _check(name, tensor, stored[name])
    shared = {stored_name(name, stored, names.body_prefix) for pair in names.tied.items() for name in pair}
    left = set(stored) - set(wanted) - shared
    return Match(wanted, sorted(name for name in left if not _is_harmless(name, stored[name].shape, names)))


def _name_in(stored: Stored, name: str, names: Names) -> str:
    """Returns the name of a tensor in a folder: its own, else that of a tensor that is tied to it."""
    own = stored_name(name, stored, names.body_prefix)
    copies = [stored_name(one, stored, names.body_prefix) for one, other in names.tied.items() if other == name]
    return next((copy for copy in (own, *copies) if copy in stored), own)


def _check(name: str, tensor: torch.Tensor, stored: StoredTensor) -> None:
    """Raises UserError where a stored tensor has not the shape of the model's, or is quantized."""
    if tensor.shape != stored.shape:
        what = f"{name} has shape {tuple(stored.shape)} where the model's config.json wants {tuple(tensor.shape)}"
        raise UserError(str(stored.file), what)
    if tensor.is_floating_point() and stored.dtype not in FLOATS:
        what = f"{name} is stored as {stored.dtype}: it is quantized"
        raise UserError(str(stored.file), what, "weights in full or half precision")


def _is_harmless(name: str, shape: torch.Size, names: Names) -> bool:
    """Returns whether a tensor for which the model has no place is a buffer, or one that its class expects."""
    is_causal_mask = name.endswith(".bias") and len(shape) == 4 and shape[2] == shape[3]
    return is_causal_mask or any(re.search(pattern, name) for pattern in (*OLD_BUFFERS, *names.ignored))
