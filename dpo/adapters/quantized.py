"""The frozen weights of a model that are stored as NF4: those of the linear layers of its decoder layers.

Norms, embeddings, the head, routers, experts (which are no linear layers) and what is trained stay as they are.
"""

import hashlib
import json
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from dpo.adapters.names import base_name
from dpo.adapters.nf4 import BLOCK
from dpo.adapters.nf4_linear import NF4Linear
from dpo.adapters.spec import AdapterSpec
from dpo.adapters.targets import ROUTERS
from dpo.base.errors import UserError

KEY = "lora.quantize"


def quantize_layers(model: PreTrainedModel, spec: AdapterSpec, compute: torch.dtype) -> None:
    """Replaces the frozen linear layers of the decoder layers by NF4Linear.

    Args:
        model: on the meta device, with its adapters, before it is sharded; modified in place.
        spec: the adapters.
        compute: the dtype of the forward pass.

    Raises:
        UserError: there is no such layer, or an adapter is for a single parameter, not for a layer.
    """
    if spec.target_parameters:
        what = f"an adapter for the parameter {spec.target_parameters[0]} needs a weight that is not quantized"
        raise UserError(KEY, what, "null")
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    made = dict[nn.Module, NF4Linear]()  # a module may be in several layers
    for name, module in list(model.named_modules(remove_duplicate=False)):
        weight = base_name(f"{name}.weight")
        if _is_quantized(weight, module) and weight not in tied and _is_in_layer(model, name):
            layer = made.setdefault(module, NF4Linear(module, compute, isinstance(module, Conv1D)))
            model.set_submodule(name, layer)
    if not made:
        what = f"{model.config.model_type} models have no linear layer in a decoder layer that could be quantized"
        raise UserError(KEY, what, "null")


def _is_quantized(weight: str, module: nn.Module) -> bool:
    """Returns whether a layer, by the name of its weight, is a frozen linear layer and no router. Classes of other code
    are not: their product may be another.
    """
    is_linear = type(module) in (nn.Linear, Conv1D)
    return is_linear and not module.weight.requires_grad and weight.split(".")[-2] not in ROUTERS


def _is_in_layer(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return any(isinstance(module, GradientCheckpointingLayer) for module in around)


def quantized_layers(model: nn.Module) -> dict[str, NF4Linear]:
    """Returns the layers with quantized weights, by the names of the weights in the model without adapters."""
    return {
        base_name(f"{name}.weight"): module for name, module in model.named_modules() if isinstance(module, NF4Linear)
    }


# --- as a reference --------------------------------------------------------------------------------------------------


def stored_hash(base_hash: str, spec: AdapterSpec) -> str:
    """Returns the hash of the base of adapters as it is stored: of its content, and of how it is quantized, if it is.
    No two of them share log-probabilities.

    Args:
        base_hash: of the model in its folder.
        spec: the adapters; modules that are trained whole are not quantized.
    """
    if spec.quantize is None:
        return base_hash
    how = f"{spec.quantize}, blocks of {BLOCK} along rows, float32 scales, linear layers of decoder layers, not"
    return hashlib.sha256(f"{base_hash} {how} {json.dumps(sorted(spec.trained_modules))}".encode()).hexdigest()


def base_alone(spec: AdapterSpec) -> AdapterSpec:
    """Returns the spec of a model without adapters whose weights are stored as those of the base of `spec`."""
    return replace(
        AdapterSpec(rank=0, alpha=0.0), quantize=spec.quantize, trained_modules=spec.trained_modules, folder=None
    )
