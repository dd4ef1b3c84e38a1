"""Reads and checks the config of a model folder."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dpo.base.errors import InvalidValue, UserError, one_line
from dpo.hub.snapshots import find_code, offline
from dpo.model.matching import Stored, names_of, stored_name
from dpo.model.weights import tensor_files

ROWS = 4096
"""Rows of two tensors that are compared at a time."""


def read_model_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """Returns the model's config. Where the folder holds an embedding and a head of different values, the config says
    that they are not tied, whatever config.json says (`unties`).

    Raises UserError where the config cannot be read, or this trainer cannot be exact for the model.
    """
    try:
        if trust_remote_code:
            find_code(folder)
        with offline():
            config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except InvalidValue as failure:
        raise failure.at("model.trust_remote_code") from failure
    except Exception as failure:  # of a damaged file transformers and huggingface_hub raise many classes
        raise _broken(str(folder), failure) from failure
    for applies, reason in _refusals(config):
        if applies:
            raise UserError("model.path", f"{config.model_type} models are not supported: {reason}")
    if unties(folder, config, trust_remote_code):
        config.tie_word_embeddings = False
    return config


def _refusals(config: PretrainedConfig) -> list[tuple[bool, str]]:
    """Returns the reasons to refuse a model, as (whether the reason applies, reason)."""

    def has(*names: str) -> bool:
        return any(getattr(config, name, None) not in (None, False, 0, 1, 1.0) for name in names)

    alibi = config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False)
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    other_layers = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    return [
        (not hasattr(config, "vocab_size"), "they are more than a language model, and only the text of one is trained"),
        (alibi, "ALiBi biases attention by distance, and attention that shares a prompt has no place for the bias"),
        (has(*experts), "in a mixture of experts the routers' auxiliary loss would be left out"),
        (bool(getattr(config, "is_encoder_decoder", False)), "only decoders have a prompt to share"),
        (has("attn_logit_softcapping"), "attention that shares a prompt does not cap its logits"),
        (has("final_logit_softcapping", "logit_scale", "logits_scaling"), "its head scales or caps the logits"),
        (bool(other_layers), f"layers of type {', '.join(sorted(other_layers))} cannot share a prompt"),
        (has("quantization_config"), "its weights are quantized, and training needs full-precision master weights"),
    ]


def meta_model(config: PretrainedConfig, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """Returns the model of a config on the meta device, without memory for its weights.

    Args:
        config: the transformers config, which the model may change.
        trust_remote_code: whether a model's own code may run.
        options: further arguments of transformers' `from_config`.

    Raises:
        UserError: no model can be made of the config.
        KeyError: the model has no place for `attn_implementation`, which is the only argument.
    """
    try:
        with torch.device("meta"), offline():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, **options
            )
    except Exception as failure:  # a value that the checks of transformers let pass; a model's own code
        if isinstance(failure, KeyError) and failure.args == (options.get("attn_implementation"),):
            raise
        raise _broken(str(config.name_or_path), failure) from failure
    return model


def _broken(folder: str, failure: Exception) -> UserError:
    """Returns the error of a config that cannot be used."""
    what = one_line(str(failure))[:300] if isinstance(failure, (OSError, ValueError)) else ""
    what = what or f"no model can be made of it: {type(failure).__name__}: {one_line(str(failure))[:300]}"
    return UserError(f"{folder}/config.json", what)


# --- tied ------------------------------------------------------------------------------------------------------------


def unties(folder: Path, config: PretrainedConfig, trust_remote_code: bool) -> bool:
    """Returns whether a config ties the head to the embedding, and the folder stores both with different values.

    `from_pretrained` of transformers loads both then, and a model is what its files hold. Where only one of the two is
    stored, or both are equal, they are tied. Returns False for a folder whose weights are not there or broken: programs
    that need the config alone do not need them.

    Args:
        folder: a model folder.
        config: its config, as config.json says it.
        trust_remote_code: whether a model's own code may run.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return False
    try:
        stored = tensor_files(folder)
    except UserError:
        return False
    if sum(len(tensor.shape) == 2 and tensor.shape[0] == config.vocab_size for tensor in stored.values()) < 2:
        return False
    # Not the attention that config.json may name: transformers would fetch and run a kernel of that repository.
    names = names_of(meta_model(copy.deepcopy(config), trust_remote_code, attn_implementation="eager"))
    pairs = [[stored_name(name, stored, names.body_prefix) for name in pair] for pair in names.tied.items()]
    return any(_differ(stored, *pair) for pair in pairs if all(name in stored for name in pair))


def is_untied(folder: Path, config: PretrainedConfig) -> bool:
    """Returns whether a config of `read_model_config` unties what config.json ties."""
    with offline():
        written = type(config).from_pretrained(folder)
    return bool(getattr(written, "tie_word_embeddings", False)) and not config.tie_word_embeddings


def _differ(stored: Stored, one: str, other: str) -> bool:
    """Returns whether two stored tensors differ in shape or in any value; reads up to the first rows that differ."""
    if stored[one].shape != stored[other].shape:
        return True
    with (
        safe_open(stored[one].file, framework="pt") as file,
        safe_open(stored[other].file, framework="pt") as other_file,
    ):
        first, second = file.get_slice(one), other_file.get_slice(other)
        starts = range(0, stored[one].shape[0], ROWS)
        return any(bool((first[i : i + ROWS] != second[i : i + ROWS]).any()) for i in starts)
