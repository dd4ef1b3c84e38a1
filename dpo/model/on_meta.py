"""The model of a run on the meta device, with its adapters: what its sizes and costs follow from."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dpo.adapters.choice import find_adapters
from dpo.adapters.inject import inject
from dpo.config import Config
from dpo.model.build import build_on_meta
from dpo.model.parallelize import compute_dtype


def model_of(config: Config, model_config: PretrainedConfig) -> PreTrainedModel:
    """Returns the whole model of a run on the meta device, with its adapters where it has any. Frozen weights have the
    dtype of the forward pass; where that is auto, it is that of CUDA where there is a GPU.

    Args:
        config: the run's.
        model_config: the transformers config of the model.

    Raises:
        UserError: the model cannot be trained exactly, or has no layers that `lora` names.
    """
    master = getattr(torch, config.model.dtype)
    model, adapters = build_on_meta(model_config, master, config.model.trust_remote_code), find_adapters(config)
    if adapters:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        inject(model, adapters, master, compute_dtype(config.parallel, master, device))
    return model
