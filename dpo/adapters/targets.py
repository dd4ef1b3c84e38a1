"""The layers of a model that get adapters: by name, by pattern, or all linear layers of attention and dense MLPs.

The linear layers of a Llama, and what some targets are:

    model.layers.0.self_attn.q_proj    q_proj, self_attn.q_proj and model.layers.0.self_attn.q_proj are names of it
    model.layers.0.mlp.gate_proj       '.*\\.mlp\\..*' is a pattern of it: it matches the whole name
    lm_head                            is no target: its weight is read as it is, in chunks

`all-linear` is every linear layer inside a decoder layer but routers of experts.
"""

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo.adapters.spec import ALL_LINEAR, AdapterSpec
from dpo.base.errors import UserError

ROUTERS = ("gate", "router", "shared_expert_gate")
"""The last parts of the names of routers, which choose a token's experts."""
_NAME = re.compile(r"[\w.]+")
_SHOWN = 12


def find_targets(model: PreTrainedModel, spec: AdapterSpec) -> list[str]:
    """Returns the names of the layers that get an adapter, as short as they can be: `q_proj`, where each layer of a
    model whose name ends so gets one, else whole names. Sorted.

    Args:
        model: the model without adapters, which may be on the meta device.
        spec: gives `target_modules` and `exclude_modules`.

    Raises:
        UserError: a name or pattern fits no linear layer, or one that can get no adapter.
    """
    linear = linear_layers(model)
    excluded = {name for word in _words(spec.exclude_modules) for name in _matched(word, linear, "exclude_modules")}
    if spec.target_modules == ALL_LINEAR:
        chosen = {name for name in linear if name.rpartition(".")[2] not in ROUTERS}
    else:
        chosen = {name for word in _words(spec.target_modules) for name in _matched(word, linear, "target_modules")}
    chosen -= excluded
    if not chosen and not spec.target_parameters:
        raise UserError("lora.target_modules", "no layer is left after lora.exclude_modules", _valid(linear))
    short = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if meant == chosen else chosen)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Returns the names of the linear layers that can get an adapter: those of the body."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def _words(words: str | Sequence[str]) -> Sequence[str]:
    return [words] if isinstance(words, str) else words


def _matched(word: str, linear: Sequence[str], key: str) -> list[str]:
    """Returns the names of the linear layers that a name or pattern fits. Raises UserError where it fits none."""
    if _NAME.fullmatch(word):
        found = [name for name in linear if name == word or name.endswith(f".{word}")]
    else:
        try:
            found = [name for name in linear if re.fullmatch(word, name)]
        except re.error as failure:
            raise UserError(f"lora.{key}", f"{word!r} is no pattern: {failure}", _valid(linear)) from failure
    if not found:
        raise UserError(f"lora.{key}", f"{word!r} fits no linear layer of the model's body", _valid(linear))
    return found


def _valid(linear: Sequence[str]) -> str:
    """Returns the valid names, for the user: the last parts of the names."""
    short = sorted({name.rpartition(".")[2] for name in linear})
    return f"{ALL_LINEAR}, or {', '.join(short[:_SHOWN])}{', ...' if len(short) > _SHOWN else ''}"
