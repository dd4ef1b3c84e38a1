"""The keys of a run: their defaults, help texts and bounds, and the places where they were set. Without torch.

fields.py       the keys, by section, as dataclasses
lora_fields.py  the keys of `lora`
loss_facts.py   the inputs of each loss, and the keys of `loss` that it takes
keys.py         the keys as a table: types, defaults, docstrings
effects.py      the keys that change a run's result, and the keys that do not
rules.py        bounds of single keys, and rules between keys
lora_rules.py   rules between the keys of `lora`, and reference.adapter
problem.py      a wrong value, in words
peft_folder.py  a model.path that is a folder of adapters: its base and the adapters
trl_names.py    TRL's names and their counterparts here
hints.py        errors about names that do not exist, with the one that was probably meant
reading.py      checks YAML and command line against the types of the fields
strict_yaml.py  YAML 1.2 scalars, no repeated keys, errors with line numbers
shipped.py      the configs that come with the package
help.py         the text of --help-config
schema.py       the JSON schema of --config-schema
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
from dpo.config.lora_fields import LoraConfig

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
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
