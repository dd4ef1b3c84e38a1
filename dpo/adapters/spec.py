"""All that decides which adapters a model gets, from the keys of `lora` or from a folder of adapters."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

ALL_LINEAR = "all-linear"
"""The targets that `dpo.adapters.targets` finds for a model: its linear layers but the head and routers."""
ADAPTER = "default"
"""The name of a model's only adapter, inside peft."""


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of a model. Two specs with the same values, but for `folder`, give the same modules."""

    rank: int
    """0: no adapters, but a frozen base; see `dpo.adapters.quantized.base_alone`."""
    alpha: float
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """ALL_LINEAR, or names and patterns; see `dpo.adapters.targets`."""
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """The ranks of some layers, by a name or pattern as peft reads it."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    """The decoder layers that get adapters; None: all."""
    layers_pattern: tuple[str, ...] | None = None
    trained_modules: tuple[str, ...] = ()
    """Modules that are trained whole, by the ends of their names (peft's `modules_to_save`)."""
    ties: bool = False
    """Whether tied embeddings among `trained_modules` stay tied (peft's `ensure_weight_tying`)."""
    embeddings: bool = False
    """Whether the embeddings and the head are trained whole (`lora.train_embeddings`); tied ones stay tied."""
    quantize: str | None = None
    """How the frozen weights are stored: nf4; None: in the compute dtype."""
    of_peft: bool = False
    """Whether targets are read as peft reads them, which those of a folder are; see `dpo.adapters.targets`."""
    folder: Path | None = None
    """The folder of the tensors with which the adapters start; None: at random, with no effect."""

    @property
    def facts(self) -> dict[str, Any]:
        """Returns the values that must be the same for the adapters to be the same, as JSON has them."""
        values = {key.name: getattr(self, key.name) for key in fields(self) if key.name != "folder"}
        return {name: _plain(value) for name, value in values.items()}


def spec_of(facts: Mapping[str, Any]) -> AdapterSpec:
    """Returns the adapters that `AdapterSpec.facts` describes, as JSON has kept it."""
    known = {key.name for key in fields(AdapterSpec)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in facts.items() if name in known
    }
    return AdapterSpec(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def peft_config(spec: AdapterSpec, target_modules: Sequence[str]) -> Any:
    """Returns peft's config of adapters, a `peft.LoraConfig`.

    Args:
        spec: the adapters.
        target_modules: the names of the layers that get one, from `dpo.adapters.targets.find_targets`.
    """
    from peft import LoraConfig  # here: only a run with adapters needs it, and it takes two seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells of combinations that are right
        return LoraConfig(
            r=spec.rank,
            lora_alpha=_whole(spec.alpha),  # type: ignore[arg-type]  # peft takes any number
            target_modules=list(target_modules),
            target_parameters=list(spec.target_parameters) or None,
            use_rslora=spec.rslora,
            use_dora=spec.dora,
            rank_pattern=dict(spec.rank_pattern),
            alpha_pattern={name: _whole(alpha) for name, alpha in spec.alpha_pattern.items()},
            layers_to_transform=list(spec.layers_to_transform) if spec.layers_to_transform is not None else None,
            layers_pattern=list(spec.layers_pattern) if spec.layers_pattern else None,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )


def _whole(alpha: float) -> float | int:
    """Returns an integer where the number is one: other readers of adapter_config.json expect integers."""
    return int(alpha) if float(alpha).is_integer() else alpha
