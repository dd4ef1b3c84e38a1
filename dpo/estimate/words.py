"""An estimate as lines of at most 100 columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import torch
from transformers import PretrainedConfig

from dpo.config import Config
from dpo.estimate.changes import Change
from dpo.estimate.devices import Device
from dpo.estimate.lengths import MicroBatch
from dpo.estimate.memory import Memory
from dpo.estimate.speed import Cluster, Speed
from dpo.machine.data_sheets import GIB
from dpo.model.parallelize import is_compiled

COLUMNS = 100


@dataclass(frozen=True)
class Estimate:
    """What was asked and what was found."""

    config: Config
    """parallel.compute_dtype is not auto."""
    model_config: PretrainedConfig
    cluster: Cluster
    lengths: str
    """What they are, for the user."""
    largest: MicroBatch
    """The one that needs the most memory."""
    memory: Memory
    speed: Speed

    @property
    def process(self) -> float:
        """Bytes that the process has beside its tensors."""
        return self.cluster.device.process_bytes(self.memory.peak)

    @property
    def needed(self) -> float:
        """Bytes that must fit into the device."""
        return self.cluster.device.needed(*self.memory.totals)

    @property
    def fits(self) -> bool:
        """Whether they do."""
        return self.needed <= self.cluster.device.memory


def lines_of(found: Estimate) -> list[str]:
    """What was assumed, the peak and its parts, the verdict, a step's bytes and seconds."""
    lines = _assumptions(found)
    lines += [f"a rank's memory at its peak, {found.memory.moment}:", *_parts(found)]
    lines += [verdict(found), *_host_line(found), *_step(found)]
    return wrapped(lines)


def wrapped(lines: Sequence[str]) -> list[str]:
    """Lines of at most 100 columns."""
    return [part for line in lines for part in (wrap(line, COLUMNS, subsequent_indent="    "))]


def _assumptions(found: Estimate) -> list[str]:
    parallel, cluster, groups = found.config.parallel, found.cluster, found.memory.groups
    weights = sum(groups.layers) + groups.root
    copies = f"{parallel.replicate} copies" if parallel.replicate > 1 else "one copy"
    plan, trees = found.largest
    tokens, scored = sum(t.num_tokens for t in trees), sum(t.num_scored for t in trees)
    attention = "the segment loop" if cluster.device.is_cpu else "FlexAttention keeps it"
    compiled = not cluster.device.is_cpu and is_compiled(parallel, torch.device("cuda"))
    layers = ", layers as torch.compile runs them" if compiled else ""
    batches = f"{plan.num_micro_batches} micro-batch" + ("es" if plan.num_micro_batches > 1 else "")
    return [
        f"{found.model_config.model_type}, {shown_count(weights)} weights, {copies} over {cluster.num_ranks}"
        f" {cluster.device.name}, {cluster.ranks_per_node} a node; {found.config.optim.name},"
        f" {parallel.compute_dtype} over {found.config.model.dtype}",
        f"lengths: {found.lengths}",
        f"{batches} a rank, the largest {tokens:,} tokens, {scored:,} scored; attention as {attention}{layers}",
    ]


def _parts(found: Estimate) -> list[str]:
    parts = {kind: n for kind, n in found.memory.device.most_common() if n >= 0.005 * found.memory.peak}
    rest = found.memory.peak - sum(parts.values())
    rows = [*parts.items(), *([("other", rest)] if rest else []), ("process and fragmentation, assumed", found.process)]
    rows += found.memory.host.items() if found.cluster.device.is_cpu else []
    return [f"  {name:<36}{_size(n):>12}" for name, n in rows]


def verdict(found: Estimate) -> str:
    """One line: whether it fits."""
    what = "fits" if found.fits else "does not fit"
    return f"{what}: {gib(found.needed)} of {gib(found.cluster.device.memory)} GiB"


def _host_line(found: Estimate) -> list[str]:
    if found.cluster.device.is_cpu:
        return []
    node, kinds = found.memory.host.total() * found.cluster.ranks_per_node, ", ".join(found.memory.host)
    return [f"and of each node's own memory {_size(node)}: {kinds}"]


def _step(found: Estimate) -> list[str]:
    speed, cluster = found.speed, found.cluster
    device = cluster.device
    rows = [f"a step of {found.config.batch.pairs_per_step} pairs, {_tera(speed.flops)} TFLOP in all:"]
    for part in speed.parts:
        moved = f"{_size(part.bytes)} from each rank" if part.bytes else f"at {cluster.mfu:.0%} of the peak"
        rows.append(f"  {part.name:<16}{shown_seconds(part.seconds):>10}   {moved}")
    least, most = speed.least, speed.most
    rows.append(
        f"{shown_seconds(least)} a step if traffic hides behind the longest part, {shown_seconds(most)} if none does;"
        f" train/mfu {speed.model_seconds / most:.0%} to {speed.model_seconds / least:.0%};"
        f" links {device.link / 1e9:g} GB/s, {device.node_link / 1e9:g} a GPU between nodes"
    )
    return rows


def lines_of_changes(changes: Sequence[Change], device: Device) -> list[str]:
    """A line or two a change."""
    lines = [f"what to change, and the GiB it would need of {gib(device.memory)}:"]
    for change in changes:
        lines.append(f"  {gib(change.bytes):>7} {'fits' if change.fits else '    '} {change.words}")
    if not any(change.fits for change in changes):
        lines.append("  nothing that was tried is enough: more ranks, or devices with more memory")
    return [part for line in lines for part in (wrap(line, COLUMNS, subsequent_indent=" " * 15))]


def shown_count(number: float) -> str:
    """Billions, or millions below one."""
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.2f} million"


def _tera(number: float) -> str:
    return f"{number / 1e12:,.0f}" if number >= 1e14 else f"{number / 1e12:.3g}"


def _size(number: float) -> str:
    return f"{gib(number)} GiB" if number >= 0.1 * GIB else f"{number / 2**20:.1f} MiB"


def gib(number: float) -> str:
    """Bytes in GiB, without the unit."""
    return f"{number / GIB:,.1f}" if number >= GIB else f"{number / GIB:.2f}"


def shown_seconds(number: float) -> str:
    """Seconds, or milliseconds below a tenth of a second."""
    return f"{number:,.1f} s" if number >= 10 else f"{number:.2f} s" if number >= 0.1 else f"{1000 * number:.1f} ms"
