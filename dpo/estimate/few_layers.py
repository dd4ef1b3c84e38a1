"""The same model with few layers, and the adapters that a rehearsal of few layers gives to each.

Adapters may differ from layer to layer: by `layers_to_transform`, whole names, patterns, ranks by pattern. They are
made alike: each layer gets an adapter wherever any layer of the whole model has one, with the largest rank there. The
memory is then an upper bound. Of a model of 80 layers with q_proj in layers 0 to 79 and up_proj in layers 70 to 79,
each of the few layers has both.
"""

import copy
import re
from dataclasses import replace

from transformers import PretrainedConfig

from dpo.adapters.choice import find_adapters
from dpo.adapters.spec import ADAPTER, ALL_LINEAR, AdapterSpec
from dpo.config import Config
from dpo.model.on_meta import model_of
from dpo.model.parallelize import decoder_layers

_ALIKE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
"""Names that mean the same in each layer: without the number of a layer, and no pattern."""


def with_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """Returns the config of the same model with `num_layers` layers."""
    if num_layers == config.num_hidden_layers:
        return config
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        changed.layer_types = config.layer_types[:num_layers]
    return changed


def adapters_of_few(config: Config, model_config: PretrainedConfig) -> AdapterSpec | None:
    """Returns the adapters for the same model with few layers, alike in each; None where there are none.

    Args:
        config: the run's.
        model_config: the transformers config of the whole model.

    Raises:
        UserError: the model has no layers that `lora` names.
    """
    spec = find_adapters(config)
    if spec is None or _are_alike(spec):
        return spec
    ranks = _largest_ranks(config, model_config)
    return replace(
        spec,
        target_modules=rf".*\.\d+\.({'|'.join(map(re.escape, ranks))})",
        exclude_modules=(),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        layers_to_transform=None,
        layers_pattern=None,
    )


def _are_alike(spec: AdapterSpec) -> bool:
    """Returns whether each layer surely gets the same adapters."""
    words = [*_words(spec.target_modules), *_words(spec.exclude_modules), *spec.rank_pattern]
    return spec.layers_to_transform is None and all(word == ALL_LINEAR or _ALIKE.fullmatch(word) for word in words)


def _words(words: str | tuple[str, ...]) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else words


def _largest_ranks(config: Config, model_config: PretrainedConfig) -> dict[str, int]:
    """Returns the largest rank over layers by the name of an adapted linear layer inside a decoder layer."""
    from peft.tuners.lora.layer import Linear  # here: only a run with adapters needs it, and it takes two seconds

    ranks: dict[str, int] = {}
    for layer in decoder_layers(model_of(config, model_config)):
        for name, module in layer.named_modules():
            if isinstance(module, Linear):
                ranks[name] = max(ranks.get(name, 0), module.r[ADAPTER])
    return ranks
