"""The trees of some steps: read from the data where it is here, else built from lengths that are given or assumed.

The time of a step is estimated on steps as they come. Memory must also be enough for the longest pairs, in whichever
step they come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PretrainedConfig

from dpo.base.errors import UserError
from dpo.batch.order import PairOrder, make_order
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree, grow_trees
from dpo.config import Config
from dpo.encode.tokenizer import tokenizer_is_here
from dpo.pairs.pair_set import PairSet
from dpo.pairs.prepare import prepare_data
from dpo.pairs.report import check_enough
from dpo.sources.formats.examples import holds_ids
from dpo.sources.hub_sets import is_here
from dpo.terminal.console import say

NUM_STEPS = 16  # steps of the data that are planned, evenly spread


@dataclass(frozen=True)
class Extent:
    """The number of steps and pairs of a run."""

    num_steps: int
    num_pairs: int
    """Training pairs, a repeated one once: the reference is computed once for each."""
    num_eval_pairs: int


@dataclass(frozen=True)
class Lengths:
    """The trees that steps compute."""

    steps: tuple[tuple[Tree, ...], ...]
    longest: tuple[Tree, ...]
    """The trees of a step of the longest pairs."""
    description: str
    """Where the lengths come from, for the user."""
    extent: Extent | None = None
    """None where the data was not read."""


def find_lengths(
    config: Config, model_config: PretrainedConfig, prompt_tokens: int | None, completion_tokens: int | None
) -> Lengths:
    """Returns the given lengths, else the lengths of the data, else the maximum lengths that the config allows.

    Args:
        config: its data is read only where both numbers of tokens are None.
        model_config: the model's config.
        prompt_tokens: tokens of every prompt, or None.
        completion_tokens: tokens of every completion, or None.

    Raises:
        UserError: no length is given, the data cannot be read, and the config has no maximum length.
    """
    if prompt_tokens is None and completion_tokens is None:
        reason = _why_not_read(config)
        if reason is None:
            return _of_data(config, model_config)
    else:
        reason = "as given"
    longest, longest_prompt = config.data.max_length, config.data.max_prompt_length
    prompt = prompt_tokens or longest_prompt or (longest and longest // 2)
    completion = completion_tokens or (longest and prompt and longest - prompt)
    if not prompt or not completion or completion < 1:
        raise UserError(
            "command line: --prompt-tokens, --completion-tokens",
            "are needed where the data is not read and data.max_length is null",
            "both, in tokens",
        )
    pair = (1, "a completion") if not config.loss.facts.compares else (2, "two completions")
    description = f"prompts of {prompt:,} and {pair[1]} of {completion:,} tokens, {reason}"
    trees = _equal_trees(config.batch.pairs_per_step, prompt, completion, pair[0])
    return Lengths((trees,), trees, description)


def _why_not_read(config: Config) -> str | None:
    """Returns why the data cannot be read here; None where it can be read."""
    for source in config.data.train:
        if not is_here(source):
            return f"assumed: {source.path} is not here"
    tokenizer = config.model.tokenizer or config.model.path
    if not tokenizer_is_here(tokenizer) and not all(holds_ids(source.format) for source in config.data.train):
        return f"assumed: {tokenizer} has no tokenizer"
    return None


def _of_data(config: Config, model_config: PretrainedConfig) -> Lengths:
    here = [source for source in config.data.eval if is_here(source)]
    config = replace(config, data=replace(config.data, eval=here))
    data = prepare_data(config, model_config)
    check_enough(data.report, config.batch.pairs_per_step, say)
    order, last_step, _ = make_order(config, data)
    lengths = lengths_of_pairs(config, data.train, order, last_step)
    return replace(lengths, extent=Extent(last_step, int(data.train.is_first().sum()), len(data.eval)))


def lengths_of_pairs(config: Config, train: PairSet, order: PairOrder, last_step: int) -> Lengths:
    """Returns the trees of some steps of a run, evenly spread over its first epoch, and the trees of its
    longest pairs.

    Args:
        config: gives the pairs per step and `batch.group_by_prompt`.
        train: the training pairs.
        order: the order in which the run takes them.
        last_step: the number of steps of the run.
    """
    last = max(1, min(last_step, order.num_pairs // order.pairs_per_step))
    numbers = np.unique(np.linspace(1, last, NUM_STEPS).round().astype(int))
    steps = tuple(tuple(grow_trees(train.pairs(order.items(int(number))))) for number in numbers)
    longest = tuple(grow_trees(train.pairs(_longest_pairs(train, config))))
    looked_at = f"{len(steps)} of the first {last:,} steps"
    description = f"read from the data, {looked_at}; for memory, the longest pairs together in one step"
    return Lengths(steps, longest, description)


def _longest_pairs(pairs: PairSet, config: Config) -> np.ndarray:
    """Returns the ids of the pairs with the most tokens, as many as a step has, each once: a repeated pair would run
    once. With `batch.group_by_prompt`, prompts are ordered by the tokens of all their pairs, and the pairs of the first
    prompts are returned.
    """
    ids = np.flatnonzero(pairs.is_first())
    tokens = pairs.lengths()[ids, : 3 if pairs.has_losers else 2].sum(1)
    if config.batch.group_by_prompt:
        prompts = np.asarray(pairs.prompt_of_pair)[ids]
        tokens = np.bincount(prompts, tokens)[prompts]
    return ids[np.argsort(-tokens, kind="stable")[: config.batch.pairs_per_step]]


def _equal_trees(count: int, prompt: int, completion: int, num_completions: int) -> tuple[Tree, ...]:
    """Returns a tree per pair; a pair of one completion has it as winner and as loser."""
    ids = np.zeros(max(prompt, completion), np.int32)
    return (Tree(ids[:prompt], (ids[:completion],) * num_completions, ((0, num_completions - 1),)),) * count


MicroBatch = tuple[StepPlan, tuple[Tree, ...]]
"""The plan of a step, and the trees of one of its micro-batches on one rank."""


def largest_micro_batches(plans: Sequence[StepPlan]) -> list[MicroBatch]:
    """Returns one or two micro-batches, one of which needs the most memory.

    The first is the largest micro-batch of a step with several, during which accumulated gradients are resident too.
    The second is the largest of all, where it has more tokens than the first.
    """
    every = [(plan, trees) for plan in plans for micro_batches in plan.micro_batches for trees in micro_batches]
    accumulated = [micro_batch for micro_batch in every if micro_batch[0].num_micro_batches > 1]
    largest = [max(candidates, key=_tokens) for candidates in (accumulated, every) if candidates]
    return largest[:1] if len(largest) == 2 and _tokens(largest[0]) == _tokens(largest[1]) else largest


def _tokens(micro_batch: MicroBatch) -> int:
    return sum(tree.num_tokens for tree in micro_batch[1])
