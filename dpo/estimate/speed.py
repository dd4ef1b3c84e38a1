"""The bytes that a rank sends in a step, and the seconds that a step takes.

Arithmetic: in every micro-batch all ranks wait for the rank with the most FLOPs (`costs.step_flops`; recomputed
operations count twice), whose device reaches the share `mfu` of its peak.

Collectives: of an all-gathered or reduce-scattered tensor a rank of n sends (n - 1)/n, of an all-reduced one twice
that, over the slowest link of the ring. A group that spans nodes uses the network cards of all its members on a node
together.

The optimizer update is not counted; it matters where it runs on the host (`parallel.cpu_offload`). How much of the
traffic FSDP2 overlaps with the arithmetic depends on the shapes: a step takes at least the longest part, and at most
the sum of the parts.

For example, 1.0 s of arithmetic, 0.4 s of all-gather and 0.2 s of reduce-scatter: between 1.0 and 1.6 s per step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PretrainedConfig

from dpo.batch.costs import MODEL_UNITS, Units, cost_model, step_flops, units
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree
from dpo.config import Config, ParallelConfig
from dpo.estimate.devices import Device
from dpo.estimate.traffic import ITEMSIZES, Groups, step_traffic
from dpo.model.log_probs import recomputed_share

DEFAULT_MFU = 0.4
"""Share of its peak that a device's arithmetic is assumed to reach."""


@dataclass(frozen=True)
class Cluster:
    """The devices of a run and how they are divided over nodes."""

    device: Device
    num_ranks: int
    ranks_per_node: int
    mfu: float
    """Share of the device's peak that the arithmetic reaches while it runs."""


@dataclass(frozen=True)
class Part:
    """A part of a step's time."""

    name: str
    bytes: float
    """Bytes that a rank sends; 0 for arithmetic."""
    seconds: float


@dataclass(frozen=True)
class Speed:
    """The parts of a step's time."""

    flops: float
    """FLOPs of all ranks; recomputed operations count twice."""
    parts: tuple[Part, ...]
    model_seconds: float
    """Seconds of the step at the devices' peak, without recomputation."""

    @property
    def overlapped(self) -> float:
        """Returns the seconds of a step in which all parts overlap with the longest."""
        return max(part.seconds for part in self.parts)

    @property
    def serial(self) -> float:
        """Returns the seconds of a step in which no parts overlap."""
        return sum(part.seconds for part in self.parts)


def step_speed(
    config: Config, model_config: PretrainedConfig, plans: Sequence[StepPlan], groups: Groups, cluster: Cluster
) -> Speed:
    """Returns the mean speed of the steps of some plans.

    Args:
        config: `parallel.compute_dtype` must not be auto, and no key of `parallel` undecided.
        model_config: of the whole model.
        plans: the plans of the steps.
        groups: the groups of parameters that are all-gathered together.
        cluster: the devices.
    """
    costs = cost_model(model_config)
    dtype = config.parallel.compute_dtype
    tf32 = config.parallel.tf32 and dtype == "float32" and not cluster.device.is_cpu
    peak = cluster.device.peak("tf32" if tf32 else dtype)

    device_type = "cpu" if cluster.device.is_cpu else "cuda"

    def flops(trees: Sequence[Tree]) -> float:
        return step_flops(trees, costs, units_of(config.parallel, trees, model_config.vocab_size, device_type))

    slowest = [sum(max(map(flops, micro)) for micro in zip(*plan.micro_batches, strict=True)) for plan in plans]
    total = fmean(sum(flops(trees) for lane in plan.micro_batches for trees in lane) for plan in plans)
    model_flops = MODEL_UNITS * fmean(plan.forward_flops for plan in plans)
    arithmetic = Part("arithmetic", 0, fmean(slowest) / (peak * cluster.mfu))
    transfers = _transfers(config, groups, plans, cluster)
    return Speed(total, (arithmetic, *transfers), model_flops / (peak * cluster.num_ranks))


def units_of(parallel: ParallelConfig, trees: Sequence[Tree], vocab_size: int, device_type: str) -> Units:
    """Returns the cost in FLOPs of a micro-batch of these trees, in units; `parallel.compute_dtype` must not be
    auto.

    Args:
        parallel: gives the compute dtype, checkpointing and the head's memory.
        trees: the trees of the micro-batch.
        vocab_size: V.
        device_type: cpu or cuda.
    """
    rows = sum(tree.num_scored for tree in trees)
    dtype = getattr(torch, parallel.compute_dtype)
    recomputed = recomputed_share(rows, vocab_size, dtype, parallel.head_memory_mib * 2**20, device_type)
    return units(parallel.activation_checkpointing, recomputed)


def _transfers(config: Config, groups: Groups, plans: Sequence[StepPlan], cluster: Cluster) -> list[Part]:
    """Returns the parts of a step that send bytes over a link."""
    replicate = config.parallel.replicate
    shard = cluster.num_ranks // replicate
    inside = _ring(shard, min(shard, cluster.ranks_per_node), cluster)
    between = _ring(replicate, max(1, cluster.ranks_per_node // shard), cluster)
    gathered, scattered, reduced = _traffic(config, groups, plans, shard)
    away, twice = (shard - 1) / shard, 2 * (replicate - 1) / replicate
    transfers = [("all-gather", away * gathered, inside), ("reduce-scatter", away * scattered, inside)]
    transfers.append(("all-reduce", twice * reduced, between))
    if config.parallel.cpu_offload:  # also where one rank holds all, and there is nothing to gather
        gathered, scattered, _ = _traffic(config, groups, plans, max(shard, 2))
        itemsize = ITEMSIZES[config.model.dtype]  # both ways
        gathered *= itemsize / ITEMSIZES[config.parallel.compute_dtype]
        scattered *= itemsize / ITEMSIZES[config.parallel.reduce_dtype]
        transfers.append(("host", (gathered + scattered) / shard, cluster.device.host_link))
    return [Part(name, sent, sent / rate) for name, sent, rate in transfers if sent]


def _traffic(config: Config, groups: Groups, plans: Sequence[StepPlan], shard: int) -> tuple[float, float, float]:
    """Returns the bytes that are all-gathered, reduce-scattered and all-reduced in a step, the mean over plans."""
    itemsize = ITEMSIZES[config.parallel.compute_dtype]
    steps = [step_traffic(groups, shard, plan.num_micro_batches, config.parallel, itemsize) for plan in plans]
    return (
        fmean(step.all_gather for step in steps),
        fmean(step.reduce_scatter for step in steps),
        fmean(step.all_reduce for step in steps),
    )


def _ring(size: int, members_on_node: int, cluster: Cluster) -> float:
    """Returns the bytes per second around a ring of `size` ranks, `members_on_node` of which share a node."""
    device = cluster.device
    return device.link if size <= members_on_node else min(device.link, device.node_link * members_on_node)
