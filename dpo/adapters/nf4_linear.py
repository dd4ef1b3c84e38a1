"""A frozen linear layer whose weight is stored as NF4, and dequantized for each product."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from dpo.adapters.nf4 import PAIRS, dequantize, num_bytes
from dpo.distributed.shards import local


class NF4Linear(nn.Module):
    """Takes the place of a frozen `nn.Linear`, (outputs, inputs), or `Conv1D`, (inputs, outputs).

    Its parameter `packed` has a row for each row of the weight, so that `fully_shard` shards it as it would the weight.
    Its bytes are those of NF4; its dtype is the compute dtype, in which FSDP2 all-gathers parameters as they are, and
    its values mean nothing. Before torch 2.13, `fully_shard` takes no parameters of integers.
    """

    def __init__(self, linear: nn.Module, dtype: torch.dtype, transposed: bool):
        """Makes a layer without values on the device of another.

        Args:
            linear: the layer that it replaces, whose bias it takes.
            dtype: in which `weight` is dequantized.
            transposed: whether the weight is (inputs, outputs).
        """
        super().__init__()
        weight: Any = linear.weight
        self.shape: torch.Size = weight.shape
        self.dtype, self.transposed = dtype, transposed
        self.bias: Any = linear.bias  # a parameter or None
        width = -(-num_bytes(self.shape[1]) // dtype.itemsize)
        data = torch.empty(self.shape[0], width, dtype=dtype, device=weight.device)
        self.packed = nn.Parameter(data, requires_grad=False)
        self.pairs: Tensor
        self.register_buffer("pairs", PAIRS.to(weight.device), persistent=False)

    def fill_pairs(self) -> None:
        """Fills the table of values, which is empty where the layer was made on the meta device."""
        self.pairs.copy_(PAIRS)

    @property
    def weight(self) -> Tensor:
        """Returns the dequantized weight; of a sharded layer a DTensor of this rank's rows. DoRA and merging use it."""
        own = dequantize(own_bytes(self), self.shape[1], self.dtype, self.pairs)
        return _sharded_as(self.packed, own, self.shape) if isinstance(self.packed, DTensor) else own

    def forward(self, x: Tensor) -> Tensor:
        """Returns x W^T + bias, of a transposed layer x W + bias, in the dtype of x."""
        out: Tensor = _Product.apply(x, self.packed, self.pairs, self.shape[1], self.transposed)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _Product(Function):
    """Multiplies by the weight, or by its transpose. For the backward pass it saves the bytes, which FSDP keeps anyway,
    not the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, pairs: Tensor, columns: int, transposed: bool) -> Tensor:
        ctx.save_for_backward(packed, pairs)
        ctx.columns, ctx.transposed = columns, transposed
        weight = dequantize(packed.view(torch.uint8), columns, x.dtype, pairs)
        return x @ weight if transposed else nn.functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        packed, pairs = ctx.saved_tensors
        weight = dequantize(packed.view(torch.uint8), ctx.columns, grad.dtype, pairs)
        return grad @ weight.T if ctx.transposed else grad @ weight, None, None, None, None


def own_bytes(layer: NF4Linear) -> Tensor:
    """Returns this rank's rows of the bytes of a layer, uint8, which share its memory."""
    return local(layer.packed).detach().view(torch.uint8)


def stand_in(layer: NF4Linear) -> Tensor:
    """Returns a tensor on the meta device with the shape and the sharding of the weight of a layer: that which is read
    in its place.
    """
    packed = layer.packed
    own = torch.empty(len(own_bytes(layer)), layer.shape[1], device="meta")
    return _sharded_as(packed, own, layer.shape) if isinstance(packed, DTensor) else own


def _sharded_as(packed: DTensor, own: Tensor, shape: torch.Size) -> Tensor:
    """Returns this rank's rows as a tensor of a shape that is sharded as `packed` is."""
    mesh, placements = packed.device_mesh, packed.placements
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=(shape[1], 1))
