"""The bytes that a rank sends in a step, and the seconds that a step takes.

Arithmetic: in every micro-batch all ranks wait for the rank with the most FLOPs (`costs.step_flops`; recomputed
operations count twice), whose device reaches the share `mfu` of its peak.

Collectives: of an all-gathered or reduce-scattered tensor a rank of n sends (n - 1)/n, of an all-reduced one twice
that, over the slowest link of the ring. A group that spans nodes uses the network cards of all its members on a node
together.

The optimizer update is counted where it was measured (`measured.py`), and then overlaps with nothing; it matters where
it runs on the host (`parallel.cpu_offload`, a CPU). So do the copies of a CPU: FSDP2 copies weights into and out of
each all-gather, and gradients into each reduce-scatter, on one rank too. How much of the traffic FSDP2 overlaps with
the arithmetic depends on the shapes: a step takes at least the longest part, and at most the sum of the parts. On a CPU
nothing overlaps.

For example, 1.0 s of arithmetic, 0.4 s of all-gather and 0.2 s of reduce-scatter: between 1.0 and 1.6 s per step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PretrainedConfig

from dpo.batch.costs import (
    MODEL_UNITS,
    WHOLE_MODEL,
    Trained,
    Units,
    cost_model,
    intermediate_size,
    model_flops,
    step_flops,
    units,
)
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree
from dpo.config import Config, ParallelConfig
from dpo.estimate.devices import Device
from dpo.estimate.traffic import ITEMSIZES, Groups, step_traffic
from dpo.model.log_probs import recomputed_share


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
    """Bytes that a rank sends; 0 for a part that sends nothing."""
    seconds: float
    overlaps: bool = True
    """Whether it may run at the same time as other parts."""


@dataclass(frozen=True)
class Speed:
    """The parts of a step's time."""

    flops: float
    """FLOPs of all ranks; recomputed operations count twice."""
    parts: tuple[Part, ...]
    model_seconds: float
    """Seconds of the step at the devices' peak, without recomputation."""
    forward_seconds: float
    """Seconds of a forward pass over the trees of the step at the devices' peak, adapters aside."""
    mfu: float = 0.0
    """Share of the devices' peak that the arithmetic reaches while it runs."""

    @property
    def overlapped(self) -> float:
        """Returns the seconds of a step in which all parts that may overlap do so with the longest."""
        alone = sum(part.seconds for part in self.parts if not part.overlaps)
        return alone + max(part.seconds for part in self.parts if part.overlaps)

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
        groups: the groups of parameters that are all-gathered together, and what of them is trained.
        cluster: the devices.
    """
    device = cluster.device
    peak = device.peak(precision_of(config, device))
    flops = [flops_of_plan(config, model_config, plan, device.is_cpu, groups.trained) for plan in plans]
    needed = fmean(model_flops(plan.forward_flops, groups.trained) for plan in plans)
    slowest = fmean(slowest for slowest, _ in flops)
    elements = fmean(activations_of_plan(config, model_config, plan, device.is_cpu) for plan in plans)
    arithmetic = Part("arithmetic", 0, slowest / (peak * cluster.mfu) + elements * device.activation)
    parts = (arithmetic, *_transfers(config, groups, plans, cluster), *_local_parts(config, groups, plans, cluster))
    all_peaks = peak * cluster.num_ranks
    return Speed(
        flops=fmean(total for _, total in flops),
        parts=parts,
        model_seconds=needed / all_peaks,
        forward_seconds=fmean(sum(plan.forward_flops) for plan in plans) / all_peaks,
        mfu=slowest / (peak * arithmetic.seconds),
    )


def precision_of(config: Config, device: Device) -> str:
    """Returns the precision of a step's matrix products, by which the peak of a device is found.

    Args:
        config: `parallel.compute_dtype` must not be auto.
        device: the device of every rank.
    """
    dtype = config.parallel.compute_dtype
    return "tf32" if config.parallel.tf32 and dtype == "float32" and not device.is_cpu else dtype


def flops_of_plan(
    config: Config, model_config: PretrainedConfig, plan: StepPlan, on_cpu: bool, trained: Trained
) -> tuple[float, float]:
    """Returns the FLOPs of a step of the ranks for which the others wait, and those of all ranks.

    Args:
        config: `parallel.compute_dtype` must not be auto, and no key of `parallel` undecided.
        model_config: of the whole model.
        plan: the plan of the step.
        on_cpu: whether the step runs on a CPU; else on CUDA.
        trained: what of the model has gradients.
    """
    costs = cost_model(model_config)

    def flops(trees: Sequence[Tree]) -> float:
        units = units_of(config.parallel, trees, model_config.vocab_size, "cpu" if on_cpu else "cuda", trained)
        return step_flops(trees, costs, units)

    slowest = sum(max(map(flops, micro)) for micro in zip(*plan.micro_batches, strict=True))
    return slowest, sum(flops(trees) for lane in plan.micro_batches for trees in lane)


def activations_of_plan(config: Config, model_config: PretrainedConfig, plan: StepPlan, on_cpu: bool) -> float:
    """Returns the elements of activations that the ranks for which the others wait compute in a step: hidden and
    intermediate size per token and layer, the vocabulary per row of the head; recomputed activations count again.

    Args:
        config: `parallel.compute_dtype` must not be auto, and no key of `parallel` undecided.
        model_config: of the whole model.
        plan: the plan of the step.
        on_cpu: whether the step runs on a CPU; else on CUDA.
    """
    vocab_size: int = model_config.vocab_size
    width: int = model_config.hidden_size + intermediate_size(model_config)
    num_layers: int = model_config.num_hidden_layers

    def elements(trees: Sequence[Tree]) -> float:
        units = units_of(config.parallel, trees, vocab_size, "cpu" if on_cpu else "cuda")
        body = units.body / MODEL_UNITS * num_layers * width
        head = units.head / MODEL_UNITS * vocab_size
        return body * sum(tree.num_tokens for tree in trees) + head * sum(tree.num_scored for tree in trees)

    return sum(max(map(elements, micro)) for micro in zip(*plan.micro_batches, strict=True))


def units_of(
    parallel: ParallelConfig,
    trees: Sequence[Tree],
    vocab_size: int,
    device_type: str,
    trained: Trained = WHOLE_MODEL,
) -> Units:
    """Returns the cost in FLOPs of a micro-batch of these trees, in units; `parallel.compute_dtype` must not be
    auto.

    Args:
        parallel: gives the compute dtype, checkpointing and the head's memory.
        trees: the trees of the micro-batch.
        vocab_size: V.
        device_type: cpu or cuda.
        trained: what of the model has gradients.
    """
    rows = sum(tree.num_scored for tree in trees)
    dtype = getattr(torch, parallel.compute_dtype)
    recomputed = recomputed_share(rows, vocab_size, dtype, parallel.head_memory_mib * 2**20, device_type)
    return units(parallel.activation_checkpointing, recomputed, trained)


def gather_seconds(config: Config, groups: Groups, cluster: Cluster) -> float:
    """Returns the seconds in which all parameters are all-gathered once, with `parallel.cpu_offload` from the hosts.

    Args:
        config: `parallel.compute_dtype` must not be auto.
        groups: the groups of parameters that are all-gathered together.
        cluster: the devices.
    """
    device, elements = cluster.device, groups.elements
    shard = cluster.num_ranks // config.parallel.replicate
    gathered = ITEMSIZES[config.parallel.compute_dtype] * elements
    link = (shard - 1) / shard * gathered / _ring(shard, min(shard, cluster.ranks_per_node), cluster)
    from_host = stored_itemsize(config, groups) * elements / shard / device.host_link
    return link + gathered * device.gather_copy + (from_host if config.parallel.cpu_offload else 0.0)


def _transfers(config: Config, groups: Groups, plans: Sequence[StepPlan], cluster: Cluster) -> list[Part]:
    """Returns the parts of a step that send bytes over a link."""
    replicate = config.parallel.replicate
    shard = cluster.num_ranks // replicate
    inside = _ring(shard, min(shard, cluster.ranks_per_node), cluster)
    scattering = inside * cluster.device.scatter_share
    between = _ring(replicate, max(1, cluster.ranks_per_node // shard), cluster)
    gathered, scattered, reduced = _traffic(config, groups, plans, shard)
    away, twice = (shard - 1) / shard, 2 * (replicate - 1) / replicate
    transfers = [("all-gather", away * gathered, inside), ("reduce-scatter", away * scattered, scattering)]
    transfers.append(("all-reduce", twice * reduced, between))
    if config.parallel.cpu_offload:  # also where one rank holds all, and there is nothing to gather
        gathered, scattered, _ = _traffic(config, groups, plans, max(shard, 2))
        gathered *= stored_itemsize(config, groups) / ITEMSIZES[config.parallel.compute_dtype]
        scattered *= ITEMSIZES[config.model.dtype] / ITEMSIZES[config.parallel.reduce_dtype]
        transfers.append(("host", (gathered + scattered) / shard, cluster.device.host_link))
    return [Part(name, sent, sent / rate) for name, sent, rate in transfers if sent]


def stored_itemsize(config: Config, groups: Groups) -> float:
    """Returns the mean bytes of a parameter as it is stored: trained ones in the dtype of the master weights, frozen
    ones in the compute dtype.
    """
    share = groups.num_reduced / groups.elements
    return share * ITEMSIZES[config.model.dtype] + (1 - share) * ITEMSIZES[config.parallel.compute_dtype]


def _local_parts(config: Config, groups: Groups, plans: Sequence[StepPlan], cluster: Cluster) -> list[Part]:
    """Returns the parts of a step that send nothing, beside the arithmetic: none unless they were measured."""
    device, shard = cluster.device, cluster.num_ranks // config.parallel.replicate
    gathered, scattered, _ = _traffic(config, groups, plans, max(shard, 2))
    copies = gathered * device.gather_copy + scattered * device.reduce_copy
    update = device.update * groups.num_reduced / shard
    parts = [Part("copies", 0, copies), Part("update", 0, update, overlaps=False)]
    return [part for part in parts if part.seconds]


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
