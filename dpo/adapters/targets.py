"""The layers of a model that get adapters: by name, by pattern, or all linear layers of attention and dense MLPs.

The linear layers of a Llama, and what some targets are:

    model.layers.0.self_attn.q_proj    q_proj, self_attn.q_proj and model.layers.0.self_attn.q_proj are names of it
    model.layers.0.mlp.gate_proj       '.*\\.mlp\\..*' is a pattern of it: it matches the whole name
    lm_head                            is no target: its weight is read as it is, in chunks

`all-linear` is every linear layer but the head, routers of experts, and experts that are linear layers. A router gets
an adapter only where a target has its name, and a pattern only where the router's name stands in it (`.*\\.gate`).

In a folder of adapters the targets are peft's: there all-linear and patterns take in routers too, and a name that fits
nothing is as good as none. Whether the folder fits the model is then seen by its tensors.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo.adapters.spec import ALL_LINEAR, AdapterSpec
from dpo.base.errors import UserError
from dpo.command.likeness import closest, meant
from dpo.hub.files import ADAPTER_CONFIG

ROUTERS = ("gate", "router", "shared_expert_gate")
"""The last parts of the names of routers, which choose a token's experts."""
EXPERTS = "experts"
"""The part of a name below which a model has its experts."""
_NAME = re.compile(r"[\w.]+")
_SHOWN = 12


@dataclass(frozen=True)
class _Names:
    """The names of a model's modules."""

    linear: Sequence[str]
    """Linear layers that can get an adapter: those of the body."""
    embeddings: Sequence[str]
    """The embeddings and the head."""
    others: Sequence[str]
    parameters: Sequence[str]
    """Parameters that can get an adapter of their own: those with two axes or more."""


def find_targets(model: PreTrainedModel, spec: AdapterSpec) -> list[str]:
    """Returns the names of the layers that get an adapter, as short as they can be: `q_proj`, where each layer of a
    model whose name ends so gets one, else whole names. Sorted.

    Args:
        model: the model without adapters, which may be on the meta device.
        spec: the adapters; see `AdapterSpec`.

    Raises:
        UserError: a name or pattern fits no linear layer, or one that can get no adapter; or no layer is left; or a
            weight would get two adapters; or tied embeddings were trained apart.
    """
    _check_parameters(model, spec)
    _check_tied(model, spec)
    names = _names_of(model)
    excluded = {
        name for word in _words(spec.exclude_modules) for name in _fitting(word, names, spec, "exclude_modules")
    }
    wanted = {name for word in _words(spec.target_modules) for name in _fitting(word, names, spec, "target_modules")}
    wanted = {name for name in wanted if _is_in_layers(name, spec) and not _is_trained_whole(name, spec)}
    chosen = wanted - excluded
    if not chosen and not spec.target_parameters:
        what = "no layer is left after exclude_modules" if wanted else "no layer of the model is a target"
        raise UserError(_place(spec, "target_modules"), what, _valid(names.linear))
    _check_apart(chosen, spec)
    short = {_last(name) for name in chosen}
    is_whole = {name for name, _ in model.named_modules() if _last(name) in short} == chosen
    return sorted(short if is_whole else chosen)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Returns the names of the linear layers that can get an adapter: those of the body."""
    return list(_names_of(model).linear)


def _names_of(model: PreTrainedModel) -> _Names:
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    linear, embeddings, others = list[str](), list[str](), list[str]()
    for name, module in model.named_modules():
        is_end = isinstance(module, nn.Embedding) or any(module is end for end in ends)
        kind = embeddings if is_end else linear if isinstance(module, (nn.Linear, Conv1D)) else others
        kind.append(name)
    return _Names(linear, embeddings, others, [name for name, p in model.named_parameters() if p.ndim > 1])


def _words(words: str | Sequence[str]) -> Sequence[str]:
    return [words] if isinstance(words, str) else words


def _last(name: str) -> str:
    return name.rpartition(".")[2]


# --- one name or pattern ---------------------------------------------------------------------------------------------


def _fitting(word: str, names: _Names, spec: AdapterSpec, key: str) -> list[str]:
    """Returns the names of the linear layers that a name or pattern fits.

    Args:
        word: one of `key`.
        names: of the model's modules.
        spec: the adapters; from a folder, a word may fit nothing.
        key: `target_modules` or `exclude_modules`.

    Raises:
        UserError: it fits no layer that can get an adapter.
    """
    is_of_peft = spec.of_peft
    takes_all = is_of_peft or key == "exclude_modules"
    found = [name for name in names.linear if _fits(word, name) and (takes_all or not _is_left_out(word, name))]
    ends = [name for name in names.embeddings if _fits(word, name) and word != ALL_LINEAR]
    if ends and key == "target_modules" and (_NAME.fullmatch(word) or not found):
        valid = _MERGED if is_of_peft else "lora.train_embeddings true, which trains embeddings and head whole"
        raise UserError(_place(spec, key), f"{word!r} is {_last(ends[0])}, which can get no adapter", valid)
    if not found and not is_of_peft and not (ends and key == "exclude_modules"):
        raise UserError(_place(spec, key), _fault(word, names), _valid(_held(word, names) or names.linear))
    return found


_MERGED = "adapters of other layers; peft's merge_and_unload makes a whole model of these and their base"


def _fits(word: str, name: str) -> bool:
    """Returns whether a target is a name, or a pattern, of a module."""
    if word == ALL_LINEAR:
        return True
    if _NAME.fullmatch(word):
        return name == word or name.endswith(f".{word}")
    return re.fullmatch(word, name) is not None


def _is_left_out(word: str, name: str) -> bool:
    """Returns whether a layer that a target fits is a router that the target does not name, or an expert of
    `all-linear`.
    """
    if word == ALL_LINEAR and EXPERTS in name.split("."):
        return True
    return _last(name) in ROUTERS and re.search(rf"(?<!\w){_last(name)}(?!\w)", word) is None


def _fault(word: str, names: _Names) -> str:
    """Returns what is wrong with a target that fits no linear layer."""
    if _held(word, names):
        return f"{word!r} is no linear layer, but holds some"
    holders = [name for name in names.others if name and _fits(word, name)]
    if holders:
        own = sorted({".".join(p.split(".")[-2:]) for p in names.parameters for h in holders if p.startswith(f"{h}.")})
        remedy = f"; its parameters can be adapted: lora.target_parameters [{', '.join(own)}]" if own else ""
        return f"{word!r} is no linear layer{remedy}"
    if any(_fits(word, name) for name in names.linear):
        return f"{word!r} fits routers of experts alone, which get adapters by their names"
    near = closest(word, sorted({_last(name) for name in names.linear})) if _NAME.fullmatch(word) else None
    return f"{word!r} fits no linear layer of the model{meant(near)}"


def _held(word: str, names: _Names) -> list[str]:
    """Returns the linear layers inside the modules that a target fits, none of which is a linear layer."""
    holders = [name for name in names.others if name and _fits(word, name)]
    return [name for name in names.linear if any(name.startswith(f"{holder}.") for holder in holders)]


def _valid(linear: Sequence[str]) -> str:
    """Returns the valid names, for the user: the last parts of the names."""
    short = sorted({_last(name) for name in linear})
    return f"{ALL_LINEAR}, or {', '.join(short[:_SHOWN])}{', ...' if len(short) > _SHOWN else ''}"


def _place(spec: AdapterSpec, key: str) -> str:
    """Returns the place of a target, for errors: the key of the config, or the file and its key."""
    return f"lora.{key}" if spec.folder is None else f"{spec.folder / ADAPTER_CONFIG}: {key}"


# --- what only a folder of adapters has ------------------------------------------------------------------------------


def _is_in_layers(name: str, spec: AdapterSpec) -> bool:
    """Returns whether a layer is in one of the decoder layers that get adapters; a target that is its whole name is."""
    if spec.layers_to_transform is None or name in _words(spec.target_modules):
        return True
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in spec.layers_pattern or ()]
    found = (re.match(pattern, name) for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."])
    number = next((match[1] for match in found if match), None)
    return number is not None and int(number) in spec.layers_to_transform


def _is_trained_whole(name: str, spec: AdapterSpec) -> bool:
    """Returns whether a layer is in a module that is trained whole, which gets no adapter."""
    return any(f".{word}." in f".{name}." for word in spec.trained_modules)


def _check_tied(model: PreTrainedModel, spec: AdapterSpec) -> None:
    """Raises UserError where a folder has one of two tied weights, the embeddings and the head, as a copy of its own:
    here they are one parameter.
    """
    head = model.get_output_embeddings()
    if spec.ties or head is None or head.weight is not model.get_input_embeddings().weight:
        return
    ends = [name for name, module in model.named_modules() if module in (head, model.get_input_embeddings())]
    if sum(name.endswith(spec.trained_modules) for name in ends) == 1:
        what = "the embeddings of the model are its head too, and the adapters have a copy of one alone"
        raise UserError(_place(spec, "ensure_weight_tying"), what, "true, or a base with tie_word_embeddings false")


# --- parameters ------------------------------------------------------------------------------------------------------


def _check_parameters(model: PreTrainedModel, spec: AdapterSpec) -> None:
    """Raises UserError where a name of `target_parameters` fits no parameter."""
    names = [name for name, _ in model.named_parameters()]
    for word in spec.target_parameters:
        if not any(name == word or name.endswith(f".{word}") for name in names):
            experts = sorted(set(_parameters_of_experts(model)))
            valid = ", ".join(experts) if experts else "null: the model has no experts"
            raise UserError(_place(spec, "target_parameters"), f"{word!r} fits no parameter of the model", valid)


def _check_apart(layers: Collection[str], spec: AdapterSpec) -> None:
    """Raises UserError where the weight of a layer that gets an adapter is one of `target_parameters` too."""
    for name in sorted(layers):
        for word in spec.target_parameters:
            if _fits(word, f"{name}.weight"):
                what = f"{word!r} is the weight of {name}, which target_modules names too"
                raise UserError(_place(spec, "target_parameters"), what, "each weight in one of the two")


def _parameters_of_experts(model: PreTrainedModel) -> Iterator[str]:
    """Yields the ends of the names of the parameters that hold the weights of several experts."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            yield ".".join(name.split(".")[-2:])
