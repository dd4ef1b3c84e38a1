"""A model from which a policy starts, or a reference: its folder and config, its adapters, its hash by content."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from dpo.adapters.spec import AdapterSpec


@dataclass(frozen=True)
class SourceModel:
    """A model by its content."""

    folder: Path
    """A Hugging Face folder; of a model with adapters that of its base."""
    config: PretrainedConfig
    hash: str
    """Of the weights and the config, with those adapters that change the model; "" where the loss has no reference."""
    adapters: AdapterSpec | None = None
    """None: no adapters, and no weight is quantized."""
    base_hash: str = ""
    """Of the weights as they are in the folder and the config; "" where neither the loss nor adapters need it."""

    @property
    def base(self) -> tuple[str, str | None]:
        """Returns what is the same for models that differ in their adapters alone: `base_hash`, and the form in which
        the frozen weights are stored.
        """
        return self.base_hash, self.adapters.quantize if self.adapters else None
