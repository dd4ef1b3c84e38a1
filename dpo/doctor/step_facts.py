"""The timed steps of all ranks with their FLOPs and bytes by formula, as the report has them."""

from collections.abc import Sequence
from statistics import fmean

from transformers import PretrainedConfig

from dpo.batch.costs import cost_model, model_flops
from dpo.batch.plan import StepPlan
from dpo.config import Config
from dpo.distributed.world import World
from dpo.doctor.parts import Subject
from dpo.doctor.rates import Rates
from dpo.doctor.steps import Timed, chosen_steps
from dpo.estimate import report as fields
from dpo.estimate.needs import Trial, plans_of
from dpo.estimate.parameters import groups_of
from dpo.estimate.speed import activations_of_plan, flops_of_plan
from dpo.estimate.traffic import ITEMSIZES, step_traffic


def step_facts(subject: Subject, world: World, ranks: Sequence[Timed], rates: Sequence[Rates]) -> fields.Steps:
    """Returns the timed steps.

    Args:
        subject: gives the model and the lengths.
        world: the ranks.
        ranks: the measured times by rank.
        rates: the measured rates by rank; empty where they failed.
    """
    assert subject.lengths is not None
    config, model_config, on_cpu = ranks[0].config, subject.models[0], world.device.type == "cpu"
    plans = plans_of(Trial(config, world.size), model_config, chosen_steps(subject.lengths))
    groups = groups_of(config, model_config, world.size)
    flops = [flops_of_plan(config, model_config, plan, on_cpu, groups.trained) for plan in plans]
    seconds = _slowest([rank.seconds for rank in ranks])
    needed = [model_flops(plan.forward_flops, groups.trained) for plan in plans]
    shard = world.size // config.parallel.replicate
    itemsize = ITEMSIZES[config.parallel.compute_dtype]
    traffic = [step_traffic(groups, shard, plan.num_micro_batches, config.parallel, itemsize) for plan in plans]
    once = step_traffic(groups, max(shard, 2), 1, config.parallel, itemsize)
    gathering, reducing = _empty(ranks)
    return fields.Steps(
        seconds=seconds,
        tokens=[sum(t.num_tokens for lane in plan.micro_batches for trees in lane for t in trees) for plan in plans],
        flops=[total for _, total in flops],
        slowest_flops=[slowest for slowest, _ in flops],
        slowest_activations=[activations_of_plan(config, model_config, plan, on_cpu) for plan in plans],
        model_flops=needed,
        micro_batches=[plan.num_micro_batches for plan in plans],
        all_gather_bytes=fmean(sent.all_gather for sent in traffic),
        reduce_scatter_bytes=fmean(sent.reduce_scatter for sent in traffic),
        all_reduce_bytes=fmean(sent.all_reduce for sent in traffic),
        elements_per_rank=max(rank.elements for rank in ranks),
        peak_memory_bytes=[rank.peak_memory for rank in ranks],
        mfu_of_products=_mfu(config, world, sum(needed) / sum(seconds), rates),
        forward_seconds=_slowest([rank.forward_seconds for rank in ranks]),
        forward_flops=_forward_flops(model_config, plans[0]),
        gathered_bytes=float(once.all_gather),
        reduced_bytes=float(once.reduce_scatter),
        gathering_seconds=gathering,
        reducing_seconds=reducing,
    )


def _slowest(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Returns the maximum over ranks of each of several measurements."""
    return [max(of_ranks) for of_ranks in zip(*ranks, strict=True)]


def _empty(ranks: Sequence[Timed]) -> tuple[float | None, float | None]:
    """Returns the seconds of a micro-batch without tokens and without a reduction, and those of a reduction: with g and
    r seconds, one micro-batch takes g + r and three take 3 g + r. None where they were not timed.
    """
    measured = [rank.empty_seconds for rank in ranks if rank.empty_seconds is not None]
    if len(measured) < len(ranks):
        return None, None
    one, three = _slowest(measured)
    gathering = max((three - one) / 2, 1e-9)
    return gathering, max(one - gathering, 1e-9)


def _mfu(config: Config, world: World, flops_per_second: float, rates: Sequence[Rates]) -> float | None:
    """Returns the share of the measured products of all ranks that a rate is; None where they were not measured."""
    if not rates:
        return None
    precision = "tf32" if config.parallel.tf32 and world.device.type == "cuda" else config.parallel.compute_dtype
    return flops_per_second / sum(rank.products[precision] for rank in rates)


def _forward_flops(model_config: PretrainedConfig, plan: StepPlan) -> float:
    """Returns the FLOPs of a pass without gradient of the ranks for which the others wait."""
    costs = cost_model(model_config)
    micro_batches = zip(*plan.micro_batches, strict=True)
    return sum(max(sum(map(costs.cost, trees)) for trees in lanes) for lanes in micro_batches)


def update_facts(ranks: Sequence[Timed]) -> list[fields.Update]:
    """Returns the updates that every rank has timed."""
    by_rank = [{(update.optimizer, update.momentum): update for update in rank.updates} for rank in ranks]
    kinds = [kind for kind in (by_rank[0] if by_rank else {}) if all(kind in updates for updates in by_rank)]
    return [
        fields.Update(
            optimizer=name,
            momentum=has_momentum,
            elements=[updates[name, has_momentum].elements for updates in by_rank],
            seconds=[updates[name, has_momentum].seconds for updates in by_rank],
        )
        for name, has_momentum in kinds
    ]
