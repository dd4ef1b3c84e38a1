"""Reads weights that are stored as NF4: each rank quantizes its own rows of a tensor as soon as it has read them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from dpo.adapters.nf4 import quantize
from dpo.adapters.nf4_linear import NF4Linear, own_bytes, stand_in


class QuantizingPlanner(DefaultLoadPlanner):
    """Fills the tensors of a state dict, and besides them layers with quantized weights. The rows of one of these are
    in float32, in host memory, between `resolve_tensor` and `commit_tensor` alone: of one tensor at a time.
    """

    def __init__(self, layers: Mapping[str, NF4Linear]):
        """Makes a planner of layers by the names of their weights in the files."""
        super().__init__()
        self.layers = layers

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        """Adds the weights of the layers to the tensors that are read."""
        super().set_up_planner(state_dict, metadata, is_coordinator)  # which allocates what is on the meta device
        self.state_dict = self.state_dict | {name: stand_in(layer) for name, layer in self.layers.items()}

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Returns the tensor to which an item is read, which has the rows of a shard."""
        layer = self.layers.get(read_item.dest_index.fqn)
        if layer is None:
            target: Tensor = super().resolve_tensor(read_item)
            return target
        assert read_item.lengths[1] == layer.shape[1], "whole rows are read, since a block of NF4 is a part of a row"
        return torch.empty(read_item.lengths, dtype=torch.float32)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Quantizes what was read."""
        layer = self.layers.get(read_item.dest_index.fqn)
        if layer is None:
            return super().commit_tensor(read_item, tensor)
        begin = read_item.dest_offsets[0]
        return quantize(tensor, own_bytes(layer)[begin : begin + len(tensor)])
