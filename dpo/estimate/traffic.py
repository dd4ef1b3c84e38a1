"""What the ranks send each other in a step, in bytes, by formula.

FSDP2 gathers the parameters of a group (a decoder layer; the root, which holds the rest) in one collective and reduces
their gradients in another. Each parameter is divided along its first dimension, padded to a multiple of the ranks that
share a copy. With M micro-batches a group is gathered and its gradient reduced so many times a step:

    layers, reshard_after_forward true    2 M    before its forward and before its backward pass
    root,   reshard_after_forward true      M    its backward pass begins where its forward pass ends
    all,    reshard_after_forward false     1    it stays whole until the step's last backward pass
    gradients, every_micro_batch            M
    gradients, last_micro_batch             1

Copies (HSDP) add their shards' gradients up in as many all-reduces. What does not grow with the model, the exchange of
`StepMetrics.reduce`, is counted apart.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from dpo.config import ParallelConfig

ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Traffic:
    """Bytes of the whole tensors of a step's collectives, as one rank sees them.

    Of a gathered or scattered tensor a rank of n receives and sends (n - 1)/n, of an all-reduced one twice that.
    """

    all_gather: int
    reduce_scatter: int
    all_reduce: int


@dataclass(frozen=True)
class Groups:
    """Numbers in the parameters of what is gathered together, padding included."""

    layers: tuple[int, ...]
    root: int


def parameter_groups(model: nn.Module, layers: Sequence[nn.Module], shard: int) -> Groups:
    """The groups of a model (also one on meta) whose copy is divided over `shard` ranks; tied parameters count once."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    rest = (parameter for parameter in model.parameters() if id(parameter) not in inside)
    return Groups(tuple(_padded(layer.parameters(), shard) for layer in layers), _padded(rest, shard))


def _padded(parameters: Iterable[nn.Parameter], shard: int) -> int:
    shapes = [tuple(parameter.shape) for parameter in parameters]
    return sum(math.ceil(first / shard) * shard * math.prod(rest) for first, *rest in shapes)


def step_traffic(
    groups: Groups, shard: int, num_micro_batches: int, parallel: ParallelConfig, compute_itemsize: int
) -> Traffic:
    """The traffic of a step of `num_micro_batches` on each rank, whose copy is divided over `shard` ranks.

    `compute_itemsize`: bytes of a number of the compute dtype, in which parameters are gathered. Gradients are reduced
    in `parallel.reduce_dtype`.
    """
    assert not parallel.undecided, "parallel.sync_gradients must be decided before traffic is counted"
    gathers_of_layers, gathers_of_root, reductions = 1, 1, 1
    if parallel.reshard_after_forward:
        gathers_of_layers, gathers_of_root = 2 * num_micro_batches, num_micro_batches
    if parallel.sync_gradients == "every_micro_batch":
        reductions = num_micro_batches
    gathered = gathers_of_layers * sum(groups.layers) + gathers_of_root * groups.root
    reduced = reductions * (sum(groups.layers) + groups.root)
    gradient_bytes = reduced * ITEMSIZES[parallel.reduce_dtype]
    return Traffic(
        all_gather=gathered * compute_itemsize if shard > 1 else 0,
        reduce_scatter=gradient_bytes if shard > 1 else 0,
        all_reduce=gradient_bytes // shard if parallel.replicate > 1 else 0,
    )
