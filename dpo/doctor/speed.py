"""Measures matrix products and collectives, and compares them with the data sheets."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dpo.base.units import shown_rate
from dpo.distributed.world import World, make_mesh
from dpo.doctor.parts import Finding, Part, Subject, agreed
from dpo.doctor.words import counted, flops
from dpo.estimate.devices import DEVICES, Device, this_machine
from dpo.machine.data_sheets import find_sheet
from dpo.machine.peaks import device_peak, measured_peak

SLOW = 0.5
"""Share of the expected speed below which a measurement is reported as slow."""

UNEVEN = 0.8
"""Share of the fastest rank's speed below which the slowest is reported: all ranks wait for it in every step."""

GATHERED = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
"""Bytes of the tensor that is all-gathered: about as many as FSDP2 gathers for a layer of a model of 8 billion
parameters.
"""

REPEATS = 10


# --- matrix products -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Products:
    """The matrix products of a rank, FLOPs per second."""

    precision: str
    """bfloat16, float32, float64, or tf32."""
    rate: float
    peak: float | None
    """From `dpo/machine/data_sheets.py`; None where the device is not in the table."""


def measure_products(subject: Subject, world: World) -> Products:
    """Returns the speed of matrix products in the compute dtype, measured on all ranks at once."""
    dtype = subject.compute_dtype(world.device)
    precision = str(dtype).removeprefix("torch.")
    if world.device.type == "cpu":
        return Products(precision, measured_peak(dtype), None)
    if precision == "float32" and subject.parallel.tf32:
        precision = "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    name = torch.cuda.get_device_name(world.device)
    return Products(precision, cuda_products(world.device, dtype), device_peak(name, precision))


def cuda_products(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Returns the FLOPs per second of square products on a GPU, the median. The operands are random, since zeros need
    less power.

    Args:
        device: the GPU.
        dtype: the dtype of the operands.
        size: rows and columns of the operands.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds: list[float] = []
    for _ in range(REPEATS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2.0 * size**3 / statistics.median(seconds[3:])


def describe_products(subject: Subject, products: Sequence[Products]) -> Finding:
    """Returns the slowest rank's speed, its share of the peak, and the fastest rank's speed."""
    slow, fast = (pick(products, key=lambda rank: rank.rate) for pick in (min, max))
    share = f", {slow.rate / slow.peak:.0%} of the data sheet's {flops(slow.peak)}" if slow.peak else ""
    spread = f"; the fastest rank {flops(fast.rate)}" if len(products) > 1 else ""
    advice = []
    if slow.peak and slow.rate < SLOW * slow.peak:
        advice.append("products are slow: another process on the GPU, or a clock that is held down (nvidia-smi -q)")
    if slow.rate < UNEVEN * fast.rate:
        advice.append(f"rank {products.index(slow)} is the slowest, and all ranks wait for it: look at its node")
    return Finding(
        PRODUCTS.name, (f"{slow.precision}: {flops(slow.rate)} per rank{share}{spread}",), advice=tuple(advice)
    )


PRODUCTS = Part(
    "products",
    measure_products,
    describe_products,
    remedy="a GPU with 1 GiB free that no other process uses (nvidia-smi)",
)


# --- collectives -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """An all-gather of a rank along one axis of the mesh."""

    name: str
    size: int
    """Ranks that gather together."""
    spans_nodes: bool
    num_bytes: int
    """Bytes of the gathered tensor."""
    seconds: float

    @property
    def rate(self) -> float:
        """Returns the bytes per second that a rank receives: (n - 1)/n of the gathered tensor."""
        return (self.size - 1) / self.size * self.num_bytes / self.seconds


@dataclass(frozen=True)
class Links:
    """The axes of a rank, and the links of its device."""

    axes: tuple[Axis, ...]
    device: Device | None
    """None where the table does not have it."""
    ranks_per_node: int


def measure_links(subject: Subject, world: World) -> Links:
    """All-gathers along every axis of the mesh that a run would have. Every rank must get here, or the rest hang."""
    mesh = make_mesh(world, subject.parallel)
    names = mesh.mesh_dim_names or ()
    axes = [_measure_axis(name, mesh.get_group(name), world) for name in names if mesh[name].size() > 1]
    return Links(tuple(axes), device_of(world), world.local_size)


def _measure_axis(name: str, group: dist.ProcessGroup, world: World) -> Axis:
    size, device = dist.get_world_size(group), world.device
    part_bytes = GATHERED[device.type] // size
    part, whole = agreed(lambda: make_buffers(part_bytes, size, device))
    seconds = [_gather(whole, part, group) for _ in range(REPEATS + 3)]
    return Axis(name, size, spans_nodes(group, world), part_bytes * size, statistics.median(seconds[3:]))


def spans_nodes(group: dist.ProcessGroup, world: World) -> bool:
    """Returns whether a group has ranks of other nodes than this rank's."""
    ranks_here = range(world.rank - world.local_rank, world.rank - world.local_rank + world.local_size)
    return any(rank not in ranks_here for rank in dist.get_process_group_ranks(group))


def make_buffers(part_bytes: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the input of an all-gather, and its output, `size` times as long, both uint8.

    Args:
        part_bytes: bytes of the input.
        size: ranks of the group.
        device: the device of both.
    """
    whole = torch.empty(part_bytes * size, dtype=torch.uint8, device=device)
    return torch.ones(part_bytes, dtype=torch.uint8, device=device), whole


def _gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> float:
    """Returns the seconds of one all-gather. Every rank of the group must get here, or the rest hang."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the second before torch 2.13
    if part.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    gather(whole, part, group=group)
    if part.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def device_of(world: World) -> Device | None:
    """Returns this rank's device from the table of `dpo.estimate`; of several devices with its name, the one with the
    nearest memory. None where the table does not have it.
    """
    if world.device.type == "cpu":
        return this_machine(world.local_size)
    gpu = torch.cuda.get_device_properties(world.device)
    return named_device(gpu.name, gpu.total_memory)


def named_device(name: str, memory: float) -> Device | None:
    """Returns the entry of DEVICES for CUDA's name of a GPU and its bytes of memory; None where the table does not have
    it. Its peaks are found by the same name.
    """
    sheet = find_sheet(name, memory)
    return DEVICES[sheet.key] if sheet else None


def describe_links(subject: Subject, ranks: Sequence[Links]) -> Finding:
    """Returns one line per axis: the bytes per second of the slowest rank, and their share of the link."""
    if not ranks[0].axes:
        return Finding(LINKS.name, ("one rank: nothing is sent",))
    lines, advice = [], []
    for number, axis in enumerate(ranks[0].axes):
        slowest = min((links.axes[number] for links in ranks), key=lambda axis: axis.rate)
        link = link_of(axis, ranks[0])
        share = f", {slowest.rate / link:.0%} of the link's {shown_rate(link)}" if link else ""
        formula = f"(n-1)/n x {axis.num_bytes >> 20} MiB / {1e3 * slowest.seconds:.3g} ms"
        where = "between nodes" if axis.spans_nodes else "within a node"
        lines.append(
            f"{axis.name}, {counted(axis.size, 'rank')} {where}: {shown_rate(slowest.rate)} received{share}; {formula}"
        )
        if link and slowest.rate < SLOW * link and ranks[0].device is not None and not ranks[0].device.is_cpu:
            advice.append(f"{axis.name} is slow: {SLOW_LINK[axis.spans_nodes]}")
    return Finding(LINKS.name, tuple(lines), advice=tuple(advice))


SLOW_LINK = {
    False: "nvidia-smi topo -m must show NV between GPUs; see NCCL_P2P_DISABLE and the log of NCCL_DEBUG=INFO",
    True: "NCCL_DEBUG=INFO must name IB or a plugin of the network, not Socket; NCCL_SOCKET_IFNAME, NCCL_IB_HCA",
}
"""The remedy, by whether the axis spans nodes."""


def link_of(axis: Axis, links: Links) -> float | None:
    """Returns the bytes per second that a rank could receive along an axis, by the table; None where the table does not
    have the device. Between nodes, the ranks of a node that gather together share all their network cards.
    """
    if links.device is None:
        return None
    if not axis.spans_nodes:
        return links.device.link
    members = min(axis.size, links.ranks_per_node) if axis.name == "shard" else 1
    return min(links.device.link, links.device.node_link * members)


LINKS = Part(
    "all-gather",
    measure_links,
    describe_links,
    remedy="one network for all nodes; NCCL_DEBUG=INFO logs NCCL's attempts, GLOO_SOCKET_IFNAME names a card",
)
