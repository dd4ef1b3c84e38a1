"""Measures, for a report, the rates that `dpo.estimate --measured` takes in the place of a data sheet's: products in
every precision, the collectives of a layer along each axis of the mesh, and copies to the host's memory.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dpo.distributed.world import World, make_mesh
from dpo.doctor.parts import Finding, Part, Subject, agreed
from dpo.doctor.speed import GATHERED, cuda_products, spans_nodes
from dpo.doctor.words import counted
from dpo.machine.peaks import measured_peak

PRECISIONS = {"cpu": ("float32", "float64", "bfloat16"), "cuda": ("bfloat16", "tf32", "float32")}

REPEATS = 5

COPIED = 256 * 2**20
"""Bytes of the tensor that is copied between a GPU and its host."""


@dataclass(frozen=True)
class Collected:
    """A collective of a rank, the fastest of several."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce"]
    axis: Literal["shard", "replicate"]
    size: int
    """Ranks of the axis."""
    spans_nodes: bool
    num_bytes: int
    """Of the gathered, scattered or reduced tensor."""
    seconds: float


@dataclass(frozen=True)
class Rates:
    """The measurements of a rank."""

    products: dict[str, float]
    """FLOPs per second by precision."""
    collectives: tuple[Collected, ...]
    copies: tuple[float, float] | None
    """Bytes per second to the host and to the device; None on a CPU."""


def measure_rates(subject: Subject, world: World) -> Rates:
    """Measures all rates, on all ranks at once. Every rank must get here, or the rest hang."""
    kind = world.device.type
    products = agreed(lambda: {precision: product_rate(precision, world.device) for precision in PRECISIONS[kind]})
    mesh = make_mesh(world, subject.parallel)
    num_bytes = layer_bytes(subject, kind)
    collected = [
        _collect(name, axis, mesh.get_group(axis), num_bytes, world)
        for axis in mesh.mesh_dim_names or ()
        for name in KINDS[axis]
        if mesh[axis].size() > 1
    ]
    copies = agreed(lambda: copy_rates(world.device)) if kind == "cuda" else None
    return Rates(products, tuple(collected), copies)


def product_rate(precision: str, device: torch.device) -> float:
    """Returns the FLOPs per second of matrix products on a device in bfloat16, tf32, float32 or float64."""
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    if device.type == "cpu":
        return measured_peak(dtype)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return cuda_products(device, dtype)


def layer_bytes(subject: Subject, device_type: str) -> int:
    """Returns about the bytes of a layer in float32, at least 1 MiB and at most 4 times those of the doctor's own
    all-gather, which it takes where no model is known.
    """
    if subject.sizes is None:
        return GATHERED[device_type]
    per_layer: int = 4 * subject.sizes.num_parameters // subject.models[0].num_hidden_layers
    return min(max(per_layer, 2**20), 4 * GATHERED[device_type])


Collective = Callable[[Tensor, Tensor, dist.ProcessGroup], object]
"""Called with the whole tensor, a rank's part of it, and the ranks."""


def _all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the second before torch 2.13
    gather(whole, part, group=group)


def _reduce_scatter(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the second before torch 2.13
    scatter(part, whole, group=group)


def _all_reduce(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(whole, group=group)


COLLECTIVES: dict[Literal["all_gather", "reduce_scatter", "all_reduce"], Collective] = {
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
}

KINDS: dict[str, tuple[Literal["all_gather", "reduce_scatter", "all_reduce"], ...]] = {
    "shard": ("all_gather", "reduce_scatter"),
    "replicate": ("all_gather", "all_reduce"),
}
"""The collectives that are measured, by axis. Steps all-gather nothing along `replicate`; its all-gather gives the
rate of its links.
"""


def _collect(
    kind: Literal["all_gather", "reduce_scatter", "all_reduce"],
    axis: str,
    group: dist.ProcessGroup,
    num_bytes: int,
    world: World,
) -> Collected:
    """Returns the fastest of several collectives, after a first one. Every rank must get here, or the rest hang."""
    size = dist.get_world_size(group)
    part, whole = agreed(lambda: _buffers(num_bytes // 4 // size, size, world.device))
    seconds = [seconds_of(lambda: COLLECTIVES[kind](whole, part, group), world.device) for _ in range(REPEATS + 1)]
    name: Literal["shard", "replicate"] = "shard" if axis == "shard" else "replicate"
    return Collected(kind, name, size, spans_nodes(group, world), whole.nbytes, min(seconds[1:]))


def _buffers(elements: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns a rank's part of a tensor of ones in float32, and the whole tensor, `size` times as long."""
    return torch.ones(elements, device=device), torch.ones(elements * size, device=device)


def copy_rates(device: torch.device, num_bytes: int = COPIED) -> tuple[float, float]:
    """Returns the bytes per second from a GPU to pinned memory of its host, and back.

    Args:
        device: the GPU.
        num_bytes: bytes of the tensor that is copied.
    """
    on_device = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    on_host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def rate(target: Tensor, source: Tensor) -> float:
        copy = [seconds_of(lambda: target.copy_(source, non_blocking=True), device) for _ in range(REPEATS + 1)]
        return num_bytes / min(copy[1:])

    return rate(on_host, on_device), rate(on_device, on_host)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of `work`, until the device has finished it."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_rates(subject: Subject, ranks: Sequence[Rates]) -> Finding:
    """Returns one line: what was measured; the numbers are in the report."""
    first = ranks[0]
    copies = ", copies to and from the host" if first.copies else ""
    products = f"products in {', '.join(first.products)}"
    return Finding(RATES.name, (f"{products}; {counted(len(first.collectives), 'collective')}{copies}",))


RATES = Part("rates", measure_rates, describe_rates, remedy="the remedies of products and all-gather")
