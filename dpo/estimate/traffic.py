"""The bytes that ranks send each other in a step, by formula.

FSDP2 all-gathers the parameters of a group (a decoder layer; the root, which holds the rest) in one collective and
reduce-scatters their gradients in another. Each parameter is divided along its first dimension, padded to a multiple of
the ranks that share a copy of the model. With M micro-batches a group is gathered, and its gradient reduced, so many
times per step:

    layers, reshard_after_forward true    2 M    before the forward and before the backward pass of the layer
    root,   reshard_after_forward true      M    its backward pass begins where its forward pass ends
    all,    reshard_after_forward false     1    unsharded until the last backward pass of the step
    gradients, every_micro_batch            M
    gradients, last_micro_batch             1

With adapters all weights are gathered and the gradients of those that are trained are reduced: of 8 billion weights
with 42 million in adapters, 16 GB are gathered in bfloat16, and 168 MB reduced in float32. The layers below the first
with adapters have no backward pass, for which they would be gathered again. Only the topmost of them is, since FSDP2
gathers the layer below ahead; the next forward pass uses that, unless the gradients were reduced in between.

A quantized weight is gathered as its bytes, 0.5625 per parameter with NF4.

With replicas (HSDP) the gradient shards are all-reduced as often. Traffic that does not grow with the model, the
exchange of `StepMetrics.reduce`, is not counted here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from dpo.adapters.inject import trained
from dpo.batch.costs import WHOLE_MODEL, Trained
from dpo.config import ParallelConfig
from dpo.disk.sizes import num_parameters

ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Traffic:
    """Bytes of the unsharded tensors of a step's collectives, as one rank sees them.

    Of a gathered or scattered tensor a rank of n receives and sends (n - 1)/n, of an all-reduced one twice that.
    """

    all_gather: int
    reduce_scatter: int
    all_reduce: int


@dataclass(frozen=True)
class Groups:
    """Elements of the parameters that are all-gathered together, padding included, and what of them is trained."""

    layers: tuple[int, ...]
    root: int
    reduced: "Groups | None" = None
    """The same of the trained parameters alone, whose gradients are reduced; None: all are."""
    trained: Trained = WHOLE_MODEL
    num_packed: int = 0
    """Parameters of the quantized weights less the elements, of the compute dtype, as which they are gathered."""

    @property
    def num_parameters(self) -> int:
        """Returns the parameters of all groups."""
        return self.elements + self.num_packed

    @property
    def elements(self) -> int:
        """Returns the elements of all groups."""
        return sum(self.layers) + self.root

    @property
    def num_reduced(self) -> int:
        """Returns the elements whose gradients are reduced."""
        return self.elements if self.reduced is None else self.reduced.elements


def parameter_groups(model: nn.Module, layers: Sequence[nn.Module], shard: int) -> Groups:
    """Returns the groups of a model, which may be on the meta device. Tied parameters count once. `Groups.trained` is
    that of a whole model; see `parameters.groups_of`.

    Args:
        model: the whole model.
        layers: its decoder layers, each a group; the rest is the root.
        shard: ranks over which a copy of the model is sharded.
    """
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    of_layers = [list(layer.parameters()) for layer in layers]
    packed = num_parameters(model) - sum(parameter.numel() for parameter in model.parameters())
    layers_of = tuple(_padded(parameters, shard) for parameters in of_layers)
    groups = Groups(layers_of, _padded(rest, shard), num_packed=packed)
    if all(parameter.requires_grad for parameter in model.parameters()):
        return groups
    reduced = Groups(tuple(_padded(trained(each), shard) for each in of_layers), _padded(trained(rest), shard))
    return replace(groups, reduced=reduced)


def _padded(parameters: Iterable[nn.Parameter], shard: int) -> int:
    shapes = [tuple(parameter.shape) for parameter in parameters]
    return sum(math.ceil(first / shard) * shard * math.prod(rest) for first, *rest in shapes)


def step_traffic(
    groups: Groups, shard: int, num_micro_batches: int, parallel: ParallelConfig, compute_itemsize: int
) -> Traffic:
    """Returns the traffic of a step on each rank.

    Args:
        groups: the groups of parameters of the model.
        shard: ranks over which a copy of the model is sharded.
        num_micro_batches: micro-batches per rank.
        parallel: gradients are reduced in its `reduce_dtype`.
        compute_itemsize: bytes per element of the compute dtype, in which parameters are gathered.
    """
    assert not parallel.undecided, "parallel.sync_gradients must be decided before traffic is counted"
    gathers_of_layers, gathers_of_root, reductions = 1, 1, 1
    if parallel.reshard_after_forward:
        gathers_of_layers, gathers_of_root = 2 * num_micro_batches, num_micro_batches
    if parallel.sync_gradients == "every_micro_batch":
        reductions = num_micro_batches
    gathered = gathers_of_layers * sum(groups.layers) + gathers_of_root * groups.root
    if parallel.reshard_after_forward:
        below = _layers_without_backward(groups)
        gathered -= num_micro_batches * sum(below[:-1]) + (num_micro_batches - reductions) * sum(below[-1:])
    gradient_bytes = reductions * groups.num_reduced * ITEMSIZES[parallel.reduce_dtype]
    return Traffic(
        all_gather=gathered * compute_itemsize if shard > 1 else 0,
        reduce_scatter=gradient_bytes if shard > 1 else 0,
        all_reduce=gradient_bytes // shard if parallel.replicate > 1 else 0,
    )


def _layers_without_backward(groups: Groups) -> tuple[int, ...]:
    """Returns the elements of the layers below the first with adapters."""
    depth = len(groups.layers)
    return groups.layers[: depth - round(groups.trained.layers * depth)]
