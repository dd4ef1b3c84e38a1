"""An estimate as lines of at most 100 columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import torch
from transformers import PretrainedConfig

from dpo.adapters.choice import find_adapters
from dpo.base.units import shown_bytes, shown_seconds
from dpo.config import Config
from dpo.estimate.changes import Change
from dpo.estimate.devices import Device
from dpo.estimate.lengths import MicroBatch
from dpo.estimate.memory import Memory
from dpo.estimate.speed import Cluster, Speed
from dpo.estimate.traffic import Groups
from dpo.machine.data_sheets import GIB
from dpo.model.parallelize import is_compiled

COLUMNS = 100


@dataclass(frozen=True)
class Estimate:
    """The inputs of an estimate and its results."""

    config: Config
    """Its `parallel.compute_dtype` is not auto."""
    model_config: PretrainedConfig
    cluster: Cluster
    lengths: str
    """Where the lengths come from, for the user."""
    largest: MicroBatch
    """The micro-batch that needs the most memory."""
    memory: Memory
    groups: Groups
    """The groups of parameters of the whole model, and what of them is trained."""
    speed: Speed

    @property
    def process(self) -> float:
        """Returns the bytes that the process has beside its tensors."""
        return self.cluster.device.process_bytes(self.memory.peak)

    @property
    def needed(self) -> float:
        """Returns the bytes that must fit into the device."""
        return self.cluster.device.needed(*self.memory.totals)

    @property
    def fits(self) -> bool:
        """Returns whether the bytes fit into the device."""
        return self.needed <= self.cluster.device.memory


def lines_of(estimate: Estimate) -> list[str]:
    """Returns the assumptions, the peak and its parts, the verdict, and the bytes and seconds of a step."""
    lines = _assumptions(estimate)
    lines += [f"peak memory of a rank, {estimate.memory.moment}:", *_parts(estimate)]
    lines += [verdict(estimate), *_host_line(estimate), *_step(estimate)]
    return wrapped(lines)


def wrapped(lines: Sequence[str]) -> list[str]:
    """Returns the lines wrapped to at most 100 columns."""
    return [part for line in lines for part in (wrap(line, COLUMNS, subsequent_indent="    "))]


def _assumptions(estimate: Estimate) -> list[str]:
    parallel, cluster, groups = estimate.config.parallel, estimate.cluster, estimate.groups
    copies = f"{parallel.replicate} copies" if parallel.replicate > 1 else "one copy"
    plan, trees = estimate.largest
    tokens, scored = sum(t.num_tokens for t in trees), sum(t.num_scored for t in trees)
    attention = "segment loop" if cluster.device.is_cpu else "FlexAttention"
    compiled = not cluster.device.is_cpu and is_compiled(parallel, torch.device("cuda"))
    layers = ", compiled layers" if compiled else ""
    batches = f"{plan.num_micro_batches} micro-batch" + ("es" if plan.num_micro_batches > 1 else "")
    parameters = groups.num_parameters - (groups.num_reduced if groups.reduced else 0)
    return [
        f"{estimate.model_config.model_type}, {shown_count(parameters)} parameters, {copies} over {cluster.num_ranks}"
        f" {cluster.device.name}, {cluster.ranks_per_node} per node; {estimate.config.optim.name},"
        f" {_dtypes(estimate)}",
        f"lengths: {estimate.lengths}",
        f"{batches} per rank, the largest {tokens:,} tokens, {scored:,} scored; attention: {attention}{layers}",
    ]


def _dtypes(estimate: Estimate) -> str:
    """Returns the dtypes of the weights; of a model with adapters, what of it is trained."""
    compute, master = estimate.config.parallel.compute_dtype, estimate.config.model.dtype
    if estimate.groups.reduced is None:
        return f"{compute} compute over {master} weights"
    count = shown_count(estimate.groups.num_reduced)
    adapters = find_adapters(estimate.config)
    quantized = f"{adapters.quantize} and " if adapters and adapters.quantize else ""
    return f"{count} parameters of adapters are trained, in {master}, the others frozen, in {quantized}{compute}"


def _parts(estimate: Estimate) -> list[str]:
    parts = {kind: n for kind, n in estimate.memory.device.most_common() if n >= 0.005 * estimate.memory.peak}
    rest = estimate.memory.peak - sum(parts.values())
    rows = [
        *parts.items(),
        *([("other", rest)] if rest else []),
        ("process and fragmentation, assumed", estimate.process),
    ]
    rows += estimate.memory.host.items() if estimate.cluster.device.is_cpu else []
    return [f"  {name:<36}{shown_bytes(n):>12}" for name, n in rows]


def verdict(estimate: Estimate) -> str:
    """Returns one line that says whether the step fits."""
    word = "fits" if estimate.fits else "does not fit"
    return f"{word}: {gib(estimate.needed)} of {gib(estimate.cluster.device.memory)} GiB"


def _host_line(estimate: Estimate) -> list[str]:
    if estimate.cluster.device.is_cpu:
        return []
    node, kinds = estimate.memory.host.total() * estimate.cluster.ranks_per_node, ", ".join(estimate.memory.host)
    return [f"host memory of each node {shown_bytes(node)}: {kinds}"]


def _step(estimate: Estimate) -> list[str]:
    speed, cluster = estimate.speed, estimate.cluster
    device, local = cluster.device, {"arithmetic": f"at {speed.mfu:.0%} of the device's peak"}
    rows = [f"a step of {estimate.config.batch.pairs_per_step} pairs, {_tera(speed.flops)} TFLOP on all ranks:"]
    for part in speed.parts:
        moved = f"{shown_bytes(part.bytes)} from each rank" if part.bytes else local.get(part.name, "measured")
        rows.append(f"  {part.name:<16}{shown_seconds(part.seconds):>10}   {moved}")
    links = f"links {device.link / 1e9:g} GB/s, {device.node_link / 1e9:g} GB/s per GPU between nodes"
    rows.append(f"{_seconds(speed, device.is_cpu)}; {links}")
    return rows


def _seconds(speed: Speed, on_cpu: bool) -> str:
    """Returns the seconds of a step and its MFU; a range, unless it runs on a CPU, where no parts overlap."""
    overlapped, serial = speed.overlapped, speed.serial
    slow = f"{speed.model_seconds / serial:.0%}"
    if on_cpu:
        return f"{shown_seconds(serial)} per step, as no parts overlap on a CPU; train/mfu {slow}"
    fast = f"{speed.model_seconds / overlapped:.0%}"
    seconds = f"{shown_seconds(overlapped)} per step if all parts overlap, {shown_seconds(serial)} if none do"
    return f"{seconds}; train/mfu {slow} to {fast}"


def lines_of_changes(changes: Sequence[Change], device: Device) -> list[str]:
    """Returns one or two lines per change."""
    lines = [f"changes to try, and the GiB that each needs of {gib(device.memory)}:"]
    for change in changes:
        lines.append(f"  {gib(change.bytes):>7} {'fits' if change.fits else '    '} {change.words}")
    if not any(change.fits for change in changes):
        lines.append("  none of these is enough: more ranks, or devices with more memory, are needed")
    return [part for line in lines for part in (wrap(line, COLUMNS, subsequent_indent=" " * 15))]


def shown_count(number: float) -> str:
    """Returns a number in billions, or in millions below one billion."""
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.2f} million"


def _tera(number: float) -> str:
    return f"{number / 1e12:,.0f}" if number >= 1e14 else f"{number / 1e12:.3g}"


def gib(number: float) -> str:
    """Returns bytes in GiB, without the unit."""
    return f"{number / GIB:,.1f}" if number >= GIB else f"{number / GIB:.2f}"
