"""The devices of a report (`report.py`) in the place of the data sheet's.

The report has the product rate P, five steps with their FLOPs F, elements of activations E and seconds T, and the
seconds U of the optimizer. The arithmetic of a step takes F / P seconds for matrix products, and the rest of T - U - C
for all other operations, whose time grows with the elements of the activations: (T - U - C - F / P) / E seconds each.
Narrow models have more activations per FLOP, and so reach a smaller share of P: the share that is the default of
`--mfu`. Of the five steps the fastest counts, since other processes can only lengthen a step. C is the time of traffic
and copies:

    CPU     nothing overlaps, and C is measured: rows of two tokens take g seconds per micro-batch and r seconds per
            reduction of gradients, so that C = M g + R r for M micro-batches and R reductions
    CUDA    C = 0, as if all traffic overlapped: where it does not, the share is too low, and the seconds "if none
            overlap" of another estimate are too high

What of g and r is not the link is copies, per byte of the gathered and reduced tensors (`Device.gather_copy`,
`reduce_copy`). For example, on two ranks that all-gather 1 GB/s: 0.2 GB of weights, gathered in 0.3 s, spend
0.5 x 0.2 / 1 = 0.1 s on the link, and 0.2 s or 1 ns per byte on copies.
"""

from dataclasses import replace

from dpo.base.errors import UserError
from dpo.base.units import shown_bytes, shown_seconds
from dpo.config import Config
from dpo.estimate.devices import Device, device_like, this_machine
from dpo.estimate.report import Collective, Kind, Layout, Report, Steps
from dpo.estimate.speed import Cluster, precision_of

LEAST_ARITHMETIC = 0.5
"""Share of the timed steps that must be arithmetic; below it, its seconds are the difference of larger numbers."""


def measured_device(report: Report, config: Config, ranks_per_node: int, place: str) -> Device:
    """Returns the device of a report; what was not measured is that of its data sheet.

    Args:
        report: the report.
        config: its `parallel.compute_dtype` must not be auto; gives the precision and the optimizer.
        ranks_per_node: ranks that share the memory of a CPU's node.
        place: the name of the report's file, for errors.

    Raises:
        UserError: products in the config's precision were not measured.
    """
    device = unmeasured_device(report, ranks_per_node)
    link, between = link_rate(report), node_link_rate(report)
    copies, found = report.host_copies, arithmetic(report)
    return replace(
        device,
        link=link or device.link,
        node_link=between or device.node_link,
        host_link=min(copies.to_host_bytes_per_second) if copies else device.host_link,
        flops=product_rate(report, precision_of(config, device), place),
        scatter_share=scatter_share(report),
        gather_copy=_copy(report, "all_gather"),
        reduce_copy=_copy(report, "reduce_scatter"),
        activation=found[1] if found else 0.0,
        update=update_seconds(report, config.optim.name, config.optim.momentum > 0) or 0.0,
    )


def unmeasured_device(report: Report, ranks_per_node: int) -> Device:
    """Returns the device by its name alone, with the memory of the report."""
    first = min(report.devices, key=lambda device: device.memory_bytes)
    if first.capability is None:
        return replace(this_machine(ranks_per_node), memory=first.memory_bytes / ranks_per_node)
    return replace(device_like(first.name, first.memory_bytes, first.capability)[0], memory=float(first.memory_bytes))


def product_rate(report: Report, precision: str, place: str) -> float:
    """Returns the FLOPs per second of matrix products of the slowest rank. Raises UserError where the report has none
    in this precision; `place` is the name of its file.
    """
    rates = {products.precision: min(products.flops_per_second) for products in report.products}
    if precision not in rates:
        what = f"has no products in {precision}, the precision of the config's steps"
        raise UserError(f"{place}: products", what, f"parallel.compute_dtype and tf32 for {', '.join(rates) or 'none'}")
    return rates[precision]


def arithmetic(report: Report) -> tuple[float, float] | None:
    """Returns the share of the product rate that matrix products reach in steps, 1 unless the steps were faster than
    the measured products, and the seconds of all other operations per element of the activations. None where no steps
    were timed, or all of their time is traffic and copies.
    """
    steps, layout = report.steps, report.layout
    if steps is None or layout is None:
        return None
    precision = "tf32" if layout.tf32 and report.ranks.device_type == "cuda" else layout.compute_dtype
    rate = product_rate(report, precision, "report")
    by_step = zip(
        _arithmetic_seconds(report, steps, layout), steps.slowest_flops, steps.slowest_activations, strict=True
    )
    seconds, flops, activations = min(by_step, key=lambda step: step[0] / step[1])
    if seconds <= 0:
        return None
    rest = seconds - flops / rate
    return (1.0, rest / activations) if rest > 0 else (flops / (rate * seconds), 0.0)


def _arithmetic_seconds(report: Report, steps: Steps, layout: Layout) -> list[float]:
    """Returns the seconds of each step without traffic, copies and update."""
    update = (update_seconds(report, layout.optimizer, layout.momentum) or 0.0) * steps.elements_per_rank
    reduces_each = layout.sync_gradients == "every_micro_batch"
    copies = [
        count * (steps.gathering_seconds or 0.0) + (count if reduces_each else 1) * (steps.reducing_seconds or 0.0)
        for count in steps.micro_batches
    ]
    return [seconds - other - update for seconds, other in zip(steps.seconds, copies, strict=True)]


def update_seconds(report: Report, optimizer: str, has_momentum: bool) -> float | None:
    """Returns the seconds of an update per parameter of a rank's shard, of the slowest rank; None where it was not
    measured.
    """
    for update in report.updates:
        if (update.optimizer, update.momentum) == (optimizer, has_momentum):
            return max(s / elements for s, elements in zip(update.seconds, update.elements, strict=True))
    return None


def link_rate(report: Report) -> float | None:
    """Returns the bytes per second that a rank receives in an all-gather within a node; None where no axis lies within
    a node.
    """
    return min((_received(c) for c in report.collectives if c.kind == "all_gather" and not c.spans_nodes), default=None)


def node_link_rate(report: Report) -> float | None:
    """Returns the bytes per second per device between nodes; None where no axis spans nodes. The ranks of a node that
    gather together share all its network cards.
    """
    per_node = report.ranks.ranks_per_node
    rates = [
        _received(c) / (min(c.ranks, per_node) if c.axis == "shard" else 1)
        for c in report.collectives
        if c.kind == "all_gather" and c.spans_nodes
    ]
    return min(rates, default=None)


def scatter_share(report: Report) -> float:
    """Returns the speed of a reduce-scatter as a share of an all-gather's; 1 where they were not measured."""
    gather, scatter = _of_shard(report, "all_gather"), _of_shard(report, "reduce_scatter")
    return _received(scatter) / _received(gather) if gather and scatter else 1.0


def _of_shard(report: Report, kind: Kind) -> Collective | None:
    """Returns the measurement of a collective along the axis over which the model is sharded."""
    return next((c for c in report.collectives if (c.kind, c.axis) == (kind, "shard")), None)


def _received(collective: Collective) -> float:
    """Returns the bytes per second that the slowest rank receives: (n - 1)/n of the tensor."""
    return (collective.ranks - 1) / collective.ranks * collective.tensor_bytes / max(collective.seconds)


def _copy(report: Report, kind: Kind) -> float:
    """Returns the seconds per byte of a micro-batch without tokens that the link does not explain."""
    steps = report.steps
    if steps is None or steps.gathering_seconds is None or steps.reducing_seconds is None:
        return 0.0
    gathers = kind == "all_gather"
    seconds = steps.gathering_seconds if gathers else steps.reducing_seconds
    collective = _of_shard(report, kind)
    on_link = max(collective.seconds) / collective.tensor_bytes if collective else 0.0
    return max(0.0, seconds / (steps.gathered_bytes if gathers else steps.reduced_bytes) - on_link)


def write_rate(report: Report) -> float | None:
    """Returns the bytes per second that all ranks together write and sync in the run folder; None where it was not
    measured.
    """
    storage = report.storage
    if storage is None:
        return None
    return storage.bytes_per_rank * len(storage.write_seconds) / max(storage.write_seconds)


# --- for the user ----------------------------------------------------------------------------------------------------


def sources(report: Report, config: Config, cluster: Cluster) -> list[str]:
    """Returns lines that say which numbers of an estimate are from the report, and which are not.

    Args:
        report: the report.
        config: the estimate's.
        cluster: the estimate's, of the device from `measured_device` with the values of the command line.
    """
    device, optimizer = cluster.device, config.optim.name
    beside = f"{1e9 * device.activation:.3g} ns per element of the activations"
    update = f"update by {optimizer} {1e9 * device.update:.3g} ns per parameter"
    numbers = {
        f"{device.flops or 0.0:.3g} FLOP/s in {precision_of(config, device)} products": True,
        beside if device.activation else f"{cluster.mfu:.0%} of them in steps": device.activation > 0,
        f"links within a node {device.link / 1e9:.3g} GB/s": device.link == link_rate(report),
        f"between nodes {device.node_link / 1e9:.3g} GB/s": device.node_link == node_link_rate(report),
        f"to the host {device.host_link / 1e9:.3g} GB/s": report.host_copies is not None,
        update if device.update else f"no time for the update by {optimizer}": device.update > 0,
    }
    count, name = report.ranks.ranks, report.devices[0].name
    lines = [f"measured on {count} {'rank' if count == 1 else 'ranks'} ({name}): {_listed(numbers, True)}"]
    rest = _listed(numbers, False)
    return [*lines, *([f"not from the report: {rest}"] if rest else []), *_advice(report)]


def _listed(numbers: dict[str, bool], measured: bool) -> str:
    return ", ".join(text for text, is_measured in numbers.items() if is_measured == measured)


def _advice(report: Report) -> list[str]:
    """Returns a line where the timed steps say little about the arithmetic of others."""
    steps, layout = report.steps, report.layout
    if steps is None or layout is None:
        return [f"the report has no timed steps ({report.outcome.replace('_', ' ')})"]
    share = sum(_arithmetic_seconds(report, steps, layout)) / sum(steps.seconds)
    if share >= LEAST_ARITHMETIC:
        return []
    return [f"only {max(share, 0.0):.0%} of the timed steps is arithmetic: a report of a larger model is more exact"]


def checkpoint_lines(report: Report, num_bytes: int) -> list[str]:
    """Returns a line about the seconds of a checkpoint of so many bytes; none where the disk was not measured."""
    rate = write_rate(report)
    if rate is None:
        return []
    seconds = shown_seconds(num_bytes / rate)
    return [f"a checkpoint of {shown_bytes(num_bytes)}: {seconds} at the measured {rate / 1e9:.3g} GB/s of all ranks"]
