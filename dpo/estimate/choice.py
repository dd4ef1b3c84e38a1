"""Chooses the values of `parallel.activation_checkpointing` and `parallel.sync_gradients` where they are `auto`.

Every combination of the undecided keys is timed by formula (`speed`). The fastest that leaves a share of the device's
memory free is chosen. `last_micro_batch` must be faster by a share of the step, because it keeps unsharded gradients
between micro-batches. The gradient is the same with every combination.

A rehearsal takes seconds. It is skipped where an upper bound of the memory of all combinations already fits.

For example, with 100 GiB of memory, of which 8 % must stay free:

    activation_checkpointing   seconds   GiB
    none                       1.0       95    needs more than 92: refused
    selective                  1.2       80    chosen: the fastest that fits
    full                       1.3       60    not rehearsed
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from transformers import PretrainedConfig

from dpo.batch.packing import padded_length
from dpo.batch.plan import StepPlan
from dpo.config import Config
from dpo.estimate.devices import steady
from dpo.estimate.lengths import Lengths
from dpo.estimate.memory import update_elements
from dpo.estimate.needs import Trial, needed_bytes, plans_of
from dpo.estimate.parameters import groups_of
from dpo.estimate.speed import Cluster, step_speed
from dpo.estimate.traffic import ITEMSIZES, Groups
from dpo.estimate.words import gib
from dpo.step.optim import optimizer_elements

ROOM = 0.08
"""Share of the device's memory that the choice must leave free."""
GAIN = 0.03
"""Share of a step's time that `last_micro_batch` must save."""
VALUES = {
    "activation_checkpointing": ("none", "selective", "full"),
    "sync_gradients": ("every_micro_batch", "last_micro_batch"),
}
"""The values that may replace `auto`, by key of `parallel`. Of options with equal times the earlier one is chosen."""
LEANEST = {"activation_checkpointing": "full", "sync_gradients": "every_micro_batch"}
"""The values that need the least memory, by key."""


@dataclass(frozen=True)
class Case:
    """The inputs of the choice."""

    config: Config
    """parallel.compute_dtype is not auto."""
    model_config: PretrainedConfig
    lengths: Lengths
    cluster: Cluster


@dataclass(frozen=True)
class Option:
    """A combination of values for the keys on `auto`."""

    values: dict[str, str]
    seconds: float
    """Estimated seconds of a step in which no two parts overlap."""

    @property
    def words(self) -> str:
        """Returns the keys and values, separated by commas."""
        return ", ".join(f"{key} {value}" for key, value in self.values.items())


@dataclass(frozen=True)
class Choice:
    """The chosen values."""

    values: dict[str, str]
    """By key of `parallel`."""
    fits: bool
    """Whether they leave the share `ROOM` of the memory free; if not, they need the least memory of all."""
    needs: str | None
    """The bytes that must fit into a rank's memory, as text: `71.2 GiB`, or `at most 3.1 GiB` by the bound; None where
    they are not known.
    """
    line: str
    """The choice and its reasons, for the user."""


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Returns the config with some keys of `parallel` changed."""
    return replace(config, parallel=replace(config.parallel, **values))


def without_estimate(keys: Sequence[str], failure: str) -> Choice:
    """Returns the choice where the estimate fails: for each of `keys`, the value that needs the least memory."""
    if not keys:
        return Choice(values={}, fits=True, needs=None, line=f"the memory of a step is not known: {failure}")
    values = {key: LEANEST[key] for key in keys}
    words = " ".join(f"--parallel.{key} {value}" for key, value in values.items())
    taken = f"the values that need the least memory are taken, as with {words}"
    line = f"parallel (auto): the estimate failed: {failure}; {taken}"
    return Choice(values=values, fits=False, needs=None, line=line)


def decide(case: Case) -> Choice:
    """Returns the choice, by rehearsal where the bound does not fit. This process must have no process group."""
    return decide_by_bound(case) or decide_by_rehearsal(case)


def decide_by_bound(case: Case) -> Choice | None:
    """Returns the choice where the bound shows that every combination fits; else None."""
    groups = _groups(case)
    bound = bound_bytes(case, groups)
    if bound > _usable(case.cluster):
        return None
    return choose(options(case, groups), lambda values: bound, case.cluster.device.memory, at_most=True)


def decide_by_rehearsal(case: Case) -> Choice:
    """Returns the choice by the rehearsed memory of each combination."""

    def needed(values: dict[str, str]) -> float:
        trial = Trial(with_values(case.config, values), case.cluster.num_ranks)
        return needed_bytes(trial, case.model_config, case.lengths, case.cluster.device)

    return choose(options(case, _groups(case)), needed, case.cluster.device.memory)


def _usable(cluster: Cluster) -> float:
    return (1 - ROOM) * cluster.device.memory


# --- the choice ------------------------------------------------------------------------------------------------------


def options(case: Case, groups: Groups) -> list[Option]:
    """Returns the combinations of the keys on `auto`, the preferred one first."""
    config, device = case.config, steady(case.cluster.device, case.config.parallel.compute_dtype)
    plans = plans_of(Trial(config, case.cluster.num_ranks), case.model_config, case.lengths.steps)
    cluster = replace(case.cluster, device=device)

    def option(values: dict[str, str]) -> Option:
        speed = step_speed(with_values(config, values), case.model_config, plans, groups, cluster)
        return Option(values, speed.serial)

    keys = config.parallel.undecided
    combinations = product(*(VALUES[key] for key in keys))
    return sorted((option(dict(zip(keys, values, strict=True))) for values in combinations), key=_weighed_seconds)


def _weighed_seconds(option: Option) -> float:
    """Returns the seconds by which options are compared: the seconds of `last_micro_batch` are divided by
    1 - GAIN, so that it is preferred only where it saves more than GAIN.
    """
    return option.seconds / (1 - GAIN if option.values.get("sync_gradients") == "last_micro_batch" else 1)


def choose(
    options: Sequence[Option], needed: Callable[[dict[str, str]], float], memory: float, at_most: bool = False
) -> Choice:
    """Returns the first option that leaves ROOM of the memory free, or the option that needs the least memory.

    Args:
        options: the options, the preferred one first.
        needed: returns the bytes that some values need. Called once per option, until one fits.
        memory: the device's memory, bytes.
        at_most: whether `needed` returns an upper bound.
    """
    tried: list[tuple[Option, float]] = []
    for option in options:
        tried.append((option, needed(option.values)))
        if tried[-1][1] <= (1 - ROOM) * memory:
            return Choice(option.values, True, _needs(tried[-1][1], at_most), _line(tried, options, memory, at_most))
    leanest = min(tried, key=lambda option_and_bytes: option_and_bytes[1])
    others = [entry for entry in tried if entry is not leanest]
    verdict = "does not fit" if leanest[1] > memory else f"less than {ROOM:.0%} of the memory would stay free"
    line = f"{verdict}: {_line([*others, leanest], options, memory, at_most)}"
    return Choice(leanest[0].values, False, _needs(leanest[1], at_most), line)


def _needs(size: float, at_most: bool) -> str:
    return f"{'at most ' if at_most else ''}{gib(size)} GiB"


def _line(tried: Sequence[tuple[Option, float]], options: Sequence[Option], memory: float, at_most: bool) -> str:
    """Returns the line for the user: the chosen option, which is the last of `tried`, with its memory; the options that
    do not fit; and the share of its time that these and `last_micro_batch` would save.
    """
    (chosen, chosen_bytes), others = tried[-1], tried[:-1]
    bytes_ = f"{'at most ' if at_most else ''}{gib(chosen_bytes)} of {gib(memory)} GiB"
    if not chosen.values:
        return f"a step needs {bytes_} by the estimate"
    parts = [f"parallel (auto): {chosen.words}: {bytes_} by the estimate"]
    parts += [f"{option.words} needs {gib(size)} GiB{_saving(option, chosen, ' and')}" for option, size in others]
    once = chosen.values | {"sync_gradients": "last_micro_batch"}
    untried = [o for o in options if o.values == once != chosen.values and o not in [other for other, _ in others]]
    return "; ".join([*parts, *(f"last_micro_batch{_saving(o, chosen)}" for o in untried if _saving(o, chosen))])


def _saving(option: Option, chosen: Option, before: str = "") -> str:
    """Returns ` would save 3.1% of a step`, after the word `before`; nothing where an option is not faster than the
    chosen one.
    """
    share = 1 - option.seconds / chosen.seconds
    return f"{before} would save {share:.1%} of a step" if share > 0.0005 else ""


# --- the bound -------------------------------------------------------------------------------------------------------


def _groups(case: Case) -> Groups:
    return groups_of(case.config, case.model_config, case.cluster.num_ranks)


def bound_bytes(case: Case, groups: Groups) -> float:
    """Returns an upper bound, in bytes, of the memory of every combination of the keys. On a CPU it includes the host's
    part.

        state      the rank's shard of weights; of trained weights gradients and optimizer, temporaries of the update,
                   a checkpoint's copy
        whole      all weights unsharded; all gradients as computed, as accumulated, and twice while they are reduced
        layers     per token 16 times the elements that a layer's matrix products read and write, in all layers; of
                   quantized weights a layer dequantized, 16 bytes a parameter with temporaries
        logits     twice the memory budget of the head, or all logits where they take less
    """
    config, device = case.config, case.cluster.device
    master, compute, reduced = (
        ITEMSIZES[d] for d in (config.model.dtype, config.parallel.compute_dtype, config.parallel.reduce_dtype)
    )
    frozen, trained = groups.elements - groups.num_reduced, groups.num_reduced
    kept = 3 + 2 * optimizer_elements(config.optim) + update_elements(config.optim, not device.is_cpu)
    state = (trained * master * kept + frozen * compute) * config.parallel.replicate / case.cluster.num_ranks
    whole = groups.elements * 2 * compute + trained * 4 * max(reduced, master)
    plans = plans_of(
        Trial(config, case.cluster.num_ranks), case.model_config, (case.lengths.longest, *case.lengths.steps)
    )
    tokens, rows = _maximum_tokens(plans, padded_length if not device.is_cpu else int)
    hidden = case.model_config.hidden_size
    in_layers = sum(groups.layers) + groups.num_packed
    layers = 16 * 4 * max(1, compute / 4) * tokens * (in_layers / hidden + hidden)
    layers += 16 * in_layers / len(groups.layers) if groups.num_packed else 0
    logits = 2 * min(config.parallel.head_memory_mib * 2**20, rows * case.model_config.vocab_size * 8)
    return device.needed(state + whole + layers + logits, 0.0)


def _maximum_tokens(plans: Sequence[StepPlan], row_length: Callable[[int], int]) -> tuple[int, int]:
    """Returns the maximum number of tokens of a micro-batch, padded, and the maximum number of scored rows."""
    batches = [trees for plan in plans for micro_batches in plan.micro_batches for trees in micro_batches]
    tokens = max(sum(tree.num_tokens for tree in trees) for trees in batches)
    return row_length(max(tokens, 2)), max(sum(tree.num_scored for tree in trees) for trees in batches)
