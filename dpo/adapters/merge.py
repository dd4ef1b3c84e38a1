"""Adds adapters to the weights that they adapt: W + s B A, and with DoRA each output of it scaled to its magnitude.

Each rank computes its own rows of the sum. A and B are small, and gathered whole. Of a linear layer, (outputs, inputs),
the rows are outputs; of a Conv1D, (inputs, outputs), they are inputs; of the weights of experts they are experts.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo.adapters.names import base_name
from dpo.adapters.spec import ADAPTER
from dpo.distributed.shards import local, own_rows, whole


def merged_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields each weight that has an adapter, with this added, and the name of the weight in the model without
    adapters. Every rank must get here, and take all, or the rest hang.

    Args:
        model: the sharded model.
        dtype: the dtype of the sums.
    """
    from peft.tuners.lora.layer import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    names = [base_name(f"{name}.base_layer.{_parameter(layer)}") for name, layer in layers.items()]
    assert len(set(names)) == len(names), "a weight has two adapters"
    for name, layer in zip(names, layers.values(), strict=True):
        with torch.no_grad():
            merged = _merged(layer, dtype)
        yield name, merged


def _parameter(layer: Any) -> str:
    """Returns the name of the parameter of a layer that an adapter is for; those of `target_parameters` name it."""
    return getattr(layer, "parameter_name", "weight")


def _merged(layer: Any, dtype: torch.dtype) -> Tensor:
    """Returns the weight of a layer with its adapter added, sharded as the weight is."""
    weight: Tensor = getattr(layer.get_base_layer(), _parameter(layer))
    a, b = (whole(part[ADAPTER].weight).to(dtype) for part in (layer.lora_A, layer.lora_B))
    own = local(weight).to(dtype) + layer.scaling[ADAPTER] * _change(layer, a, b, own_rows(weight))
    if ADAPTER in layer.lora_magnitude_vector:
        magnitude = whole(layer.lora_magnitude_vector[ADAPTER].weight).to(dtype)
        own *= _scale(layer, magnitude, _like(weight, own))
    return _like(weight, own)


def _change(layer: Any, a: Tensor, b: Tensor, rows: slice) -> Tensor:
    """Returns rows of what an adapter adds to a weight, but for its scaling.

    Args:
        layer: the adapted layer; E experts share the A, (E r, inputs), and B, (outputs, r E), of one of peft's.
        a: (r, inputs).
        b: (outputs, r).
        rows: of the weight.
    """
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        return a.T[rows] @ b.T if layer.fan_in_fan_out else b[rows] @ a
    ups, downs = a.reshape(experts, -1, a.shape[1])[rows], b.reshape(b.shape[0], -1, experts)[..., rows]
    change = downs.permute(2, 0, 1) @ ups
    # Weights are (E, outputs, inputs), unless the model says that its are (E, inputs, outputs).
    return change.transpose(1, 2) if getattr(layer.get_base_layer(), "is_transposed", False) else change


def _scale(layer: Any, magnitude: Tensor, merged: Tensor) -> Tensor:
    """Returns magnitude / norm of each output, in the form of this rank's rows of a weight. Every rank must get here,
    or the rest hang.
    """
    if layer.fan_in_fan_out:  # each rank holds some inputs of every output
        norms: Tensor = torch.linalg.norm(whole(merged), dim=0)
        return magnitude / norms
    norms = torch.linalg.norm(local(merged), dim=1)
    return (magnitude[own_rows(merged)] / norms)[:, None]


def _like(weight: Tensor, own: Tensor) -> Tensor:
    """Returns this rank's rows as a tensor that is sharded like `weight`."""
    if not isinstance(weight, DTensor):
        return own
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())
