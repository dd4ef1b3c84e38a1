"""Which values auto stands for in parallel.activation_checkpointing and parallel.sync_gradients.

Every combination of the keys on auto is timed by formula (`speed`); the fastest that fits the device, with a share of
its memory to spare, is chosen. last_micro_batch must be faster by a share of the step, since it keeps gradients whole
between micro-batches. The gradient is the same either way.

A rehearsal takes seconds. Where a bound that no combination exceeds fits already, there is none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from transformers import PretrainedConfig

from dpo.batch.packing import padded_length
from dpo.batch.plan import StepPlan
from dpo.config import Config
from dpo.estimate.devices import steady
from dpo.estimate.lengths import Lengths
from dpo.estimate.memory import all_groups, update_numbers, with_layers
from dpo.estimate.needs import Layout, needed_bytes, plans_of
from dpo.estimate.speed import Cluster, step_speed
from dpo.estimate.traffic import ITEMSIZES, Groups, parameter_groups
from dpo.estimate.words import gib
from dpo.model.build import build_on_meta
from dpo.model.parallelize import decoder_layers
from dpo.step.optim import optimizer_elements

ROOM = 0.08
"""Share of the device's memory that what is chosen leaves free."""
GAIN = 0.03
"""Share of a step that last_micro_batch must save."""
VALUES = {
    "activation_checkpointing": ("none", "selective", "full"),
    "sync_gradients": ("every_micro_batch", "last_micro_batch"),
}
"""The values that may replace auto, by key of parallel. Of options that take equal time the earlier one is chosen."""
LEANEST = {"activation_checkpointing": "full", "sync_gradients": "every_micro_batch"}
"""The values that need the least memory, by key."""


@dataclass(frozen=True)
class Case:
    """What the choice depends on."""

    config: Config
    """parallel.compute_dtype is not auto."""
    model_config: PretrainedConfig
    lengths: Lengths
    cluster: Cluster


@dataclass(frozen=True)
class Option:
    """A combination of values for the keys on auto."""

    values: dict[str, str]
    seconds: float
    """Of a step by the estimate, nothing hidden."""

    @property
    def words(self) -> str:
        """The values for people."""
        return ", ".join(f"{key} {value}" for key, value in self.values.items())


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    values: dict[str, str]
    """By key of parallel."""
    fits: bool
    """Whether it leaves the share of memory free that it should; if not, it is what needs the least."""
    needs: str | None
    """What must fit into a rank's memory, for the user: `71.2 GiB`, `at most 3.1 GiB` by the bound; None: not known."""
    line: str
    """It and its reasons, for the user."""


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """The config with some keys of parallel changed."""
    return replace(config, parallel=replace(config.parallel, **values))


def without_estimate(keys: Sequence[str], failure: str) -> Choice:
    """What needs the least memory, where the estimate fails, for the keys on auto."""
    if not keys:
        return Choice(values={}, fits=True, needs=None, line=f"what a step needs is not known: {failure}")
    values = {key: LEANEST[key] for key in keys}
    words = " ".join(f"--parallel.{key} {value}" for key, value in values.items())
    line = f"parallel (auto): the estimate failed: {failure}; what needs the least memory is taken, as by {words}"
    return Choice(values=values, fits=False, needs=None, line=line)


def decide(case: Case) -> Choice:
    """The choice, with a rehearsal where it needs one: in a process without a process group."""
    return decide_by_bound(case) or decide_by_rehearsal(case)


def decide_by_bound(case: Case) -> Choice | None:
    """The choice where every combination fits for certain; None where that is not known."""
    groups = groups_of(case)
    bound = most_bytes(case, groups)
    if bound > _usable(case.cluster):
        return None
    return choose(options(case, groups), lambda values: bound, case.cluster.device.memory, at_most=True)


def decide_by_rehearsal(case: Case) -> Choice:
    """The choice by what each combination needs."""

    def needed(values: dict[str, str]) -> float:
        layout = Layout(with_values(case.config, values), case.cluster.num_ranks)
        return needed_bytes(layout, case.model_config, case.lengths, case.cluster.device)

    return choose(options(case, groups_of(case)), needed, case.cluster.device.memory)


def _usable(cluster: Cluster) -> float:
    return (1 - ROOM) * cluster.device.memory


# --- the choice ------------------------------------------------------------------------------------------------------


def options(case: Case, groups: Groups) -> list[Option]:
    """The combinations of the keys on auto, the one to be preferred first."""
    config, device = case.config, steady(case.cluster.device, case.config.parallel.compute_dtype)
    plans = plans_of(Layout(config, case.cluster.num_ranks), case.model_config, case.lengths.steps)
    cluster = replace(case.cluster, device=device)

    def option(values: dict[str, str]) -> Option:
        speed = step_speed(with_values(config, values), case.model_config, plans, groups, cluster)
        return Option(values, speed.most)

    keys = config.parallel.undecided
    combinations = product(*(VALUES[key] for key in keys))
    return sorted((option(dict(zip(keys, values, strict=True))) for values in combinations), key=_weighed_seconds)


def _weighed_seconds(option: Option) -> float:
    """Seconds to compare: those of last_micro_batch are raised, so that it wins only where it saves more than GAIN."""
    return option.seconds / (1 - GAIN if option.values.get("sync_gradients") == "last_micro_batch" else 1)


def choose(
    options: Sequence[Option], needed: Callable[[dict[str, str]], float], memory: float, at_most: bool = False
) -> Choice:
    """The first option whose bytes (`needed`) leave ROOM of the memory free, else the leanest of all.

    `at_most`: the bytes are a bound.
    """
    tried: list[tuple[Option, float]] = []
    for option in options:
        tried.append((option, needed(option.values)))
        if tried[-1][1] <= (1 - ROOM) * memory:
            return Choice(option.values, True, _needs(tried[-1][1], at_most), _line(tried, options, memory, at_most))
    leanest = min(tried, key=lambda one: one[1])
    others = [one for one in tried if one is not leanest]
    what = "does not fit" if leanest[1] > memory else f"less than {ROOM:.0%} of the memory would stay free"
    line = f"{what}: {_line([*others, leanest], options, memory, at_most)}"
    return Choice(leanest[0].values, False, _needs(leanest[1], at_most), line)


def _needs(size: float, at_most: bool) -> str:
    return f"{'at most ' if at_most else ''}{gib(size)} GiB"


def _line(tried: Sequence[tuple[Option, float]], options: Sequence[Option], memory: float, at_most: bool) -> str:
    """The chosen one, which stands last, with its numbers; those that do not fit; what gradients reduced once a step
    would save.
    """
    (chosen, found), others = tried[-1], tried[:-1]
    bytes_ = f"{'at most ' if at_most else ''}{gib(found)} of {gib(memory)} GiB"
    if not chosen.values:
        return f"a step needs {bytes_} by the estimate"
    parts = [f"parallel (auto): {chosen.words}: {bytes_}, {_seconds(chosen.seconds)} a step by the estimate"]
    parts += [f"{option.words} needs {gib(size)} GiB, {_seconds(option.seconds)}" for option, size in others]
    once = chosen.values | {"sync_gradients": "last_micro_batch"}
    untried = [o for o in options if o.values == once != chosen.values and o not in [one for one, _ in others]]
    saved = [1 - option.seconds / chosen.seconds for option in untried]
    parts += [f"last_micro_batch would save {share:.1%}" for share in saved if share > 0.0005]
    return "; ".join(parts)


def _seconds(number: float) -> str:
    return f"{number:.2f} s" if number >= 0.1 else f"{1000 * number:.2g} ms"


# --- the bound -------------------------------------------------------------------------------------------------------


def groups_of(case: Case) -> Groups:
    """The sizes of what is gathered together, from the model with few layers."""
    depth, config = case.model_config.num_hidden_layers, case.config
    few = with_layers(case.model_config, min(depth, 2))
    model = build_on_meta(few, getattr(torch, config.model.dtype), config.model.trust_remote_code)
    shard = case.cluster.num_ranks // config.parallel.replicate
    return all_groups(parameter_groups(model, decoder_layers(model), shard), depth)


def most_bytes(case: Case, groups: Groups) -> float:
    """Bytes that no combination of the keys exceeds, with what must be on the host where that is the same memory.

    state      the rank's share of weights, gradients, optimizer and the update's room, and a checkpoint's copy
    whole      all weights gathered; all gradients as computed, as added up, and twice while they are reduced
    layers     of each token 16 times the numbers that a layer's products give and take, in all layers
    logits     twice the budget of the head, or all logits where they take less
    """
    config, device = case.config, case.cluster.device
    master, compute, reduced = (
        ITEMSIZES[d] for d in (config.model.dtype, config.parallel.compute_dtype, config.parallel.reduce_dtype)
    )
    numbers = sum(groups.layers) + groups.root
    local = numbers * config.parallel.replicate / case.cluster.num_ranks
    kept = 3 + 2 * optimizer_elements(config.optim) + update_numbers(config.optim, not device.is_cpu)
    state, whole = local * master * kept, numbers * (2 * compute + 4 * max(reduced, master))
    plans = plans_of(
        Layout(config, case.cluster.num_ranks), case.model_config, (case.lengths.longest, *case.lengths.steps)
    )
    tokens, rows = _most_tokens(plans, padded_length if not device.is_cpu else int)
    hidden = case.model_config.hidden_size
    layers = 16 * 4 * max(1, compute / 4) * tokens * (sum(groups.layers) / hidden + hidden)
    logits = 2 * min(config.parallel.head_memory_mib * 2**20, rows * case.model_config.vocab_size * 8)
    return device.needed(state + whole + layers + logits, 0.0)


def _most_tokens(plans: Sequence[StepPlan], row_length: Callable[[int], int]) -> tuple[int, int]:
    """The most tokens of a micro-batch, padded, and the most scored rows."""
    batches = [trees for plan in plans for rank in plan.micro_batches for trees in rank]
    tokens = max(sum(tree.num_tokens for tree in trees) for trees in batches)
    return row_length(max(tokens, 2)), max(sum(tree.num_scored for tree in trees) for trees in batches)
