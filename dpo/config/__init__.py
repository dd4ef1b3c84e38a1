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
