"""Adds adapters to the weights that they adapt: W + s B A, and with DoRA each output of it scaled to its magnitude.

Each rank computes its own rows of the sum. A and B are small, and gathered whole. Of a linear layer, (outputs, inputs),
the rows are outputs; of a Conv1D, (inputs, outputs), they are inputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo.adapters.names import base_name
from dpo.adapters.spec import ADAPTER
from dpo.distributed.shards import own_rows


def merged_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the weights that have adapters, with these added, by the names of the weights in the model without
    adapters. Every rank must get here, or the rest hang.

    Args:
        model: the sharded model.
        dtype: the dtype of the sums.
    """
    from peft.tuners.lora.layer import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    with torch.no_grad():
        return {base_name(f"{name}.base_layer.weight"): _merged(layer, dtype) for name, layer in layers.items()}


def _merged(layer: Any, dtype: torch.dtype) -> Tensor:
    weight: Tensor = layer.get_base_layer().weight
    a, b = (_whole(part[ADAPTER].weight).to(dtype) for part in (layer.lora_A, layer.lora_B))
    rows, is_transposed = own_rows(weight), bool(layer.fan_in_fan_out)
    change = a.T[rows] @ b.T if is_transposed else b[rows] @ a
    own = _local(weight).to(dtype) + layer.scaling[ADAPTER] * change
    merged = _like(weight, own)
    if ADAPTER in layer.lora_magnitude_vector:
        magnitude = _whole(layer.lora_magnitude_vector[ADAPTER].weight).to(dtype)
        if is_transposed:
            own *= magnitude / torch.linalg.norm(_whole(merged), dim=0)
        else:
            own *= (magnitude[rows] / torch.linalg.norm(own, dim=1))[:, None]
    return merged


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(weight: Tensor, own: Tensor) -> Tensor:
    """Returns this rank's rows as a tensor that is sharded like `weight`."""
    if not isinstance(weight, DTensor):
        return own
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())
