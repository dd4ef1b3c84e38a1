"""Every key of a run, with its default and its meaning, its bounds, and where it was set. Without torch.

fields.py       the keys, by section, as dataclasses
loss_facts.py   what each loss reads, and which keys of `loss` it takes
rules.py        bounds of keys, and keys that must fit each other
reading.py      YAML and command line against the fields
strict_yaml.py  YAML without surprises, with line numbers
shipped.py      the configs that come with the package
load.py         load_config, to_yaml
"""

from dpo.config.fields import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ReferenceConfig,
    SourceConfig,
    TrainConfig,
)
from dpo.config.load import load_config, to_yaml, with_place

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ReferenceConfig",
    "SourceConfig",
    "TrainConfig",
    "load_config",
    "to_yaml",
    "with_place",
]
