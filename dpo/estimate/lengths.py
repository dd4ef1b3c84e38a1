"""The trees of some steps: those of the data where it can be read here, else of lengths that are given or assumed.

Time is that of steps as they come; memory must be enough for the longest pairs too, wherever they come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from dpo.base.errors import UserError
from dpo.batch.order import PairOrder, make_order
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree, grow_trees
from dpo.config import Config
from dpo.data.formats.examples import holds_ids
from dpo.data.pair_set import PairSet
from dpo.data.prepare import prepare_data
from dpo.data.tokenizer import has_tokenizer

NUM_STEPS = 16  # of the data that are looked at, evenly spread


@dataclass(frozen=True)
class Lengths:
    """What is computed in a step."""

    steps: tuple[tuple[Tree, ...], ...]
    longest: tuple[Tree, ...]
    """Of a step of the longest pairs."""
    said: str
    """Where it is from, for the user."""


def find_lengths(
    config: Config, model_config: PretrainedConfig, prompt_tokens: int | None, completion_tokens: int | None
) -> Lengths:
    """Lengths that are given, else those of the data, else the longest that the config allows.

    Raises UserError where the config has no limit and nothing else is known.
    """
    if prompt_tokens is None and completion_tokens is None:
        missing = _what_is_missing(config)
        if missing is None:
            return _of_data(config, model_config)
    else:
        missing = "as given"
    longest, longest_prompt = config.data.max_length, config.data.max_prompt_length
    prompt = prompt_tokens or longest_prompt or (longest and longest // 2)
    completion = completion_tokens or (longest and prompt and longest - prompt)
    if not prompt or not completion or completion < 1:
        raise UserError(
            "command line: --prompt-tokens, --completion-tokens",
            "are needed where the data is not read and data.max_length is null",
            "both, in tokens",
        )
    said = f"prompts of {prompt:,} and two completions of {completion:,} tokens, {missing}"
    trees = _equal_trees(config.batch.pairs_per_step, prompt, completion)
    return Lengths((trees,), trees, said)


def _what_is_missing(config: Config) -> str | None:
    """Why the data cannot be read here; None where it can."""
    for source in config.data.train:
        if not Path(source.path).exists():
            return f"assumed: {source.path} is not here"
    tokenizer = config.model.tokenizer or config.model.path
    if not has_tokenizer(Path(tokenizer)) and not all(holds_ids(source.format) for source in config.data.train):
        return f"assumed: {tokenizer} has no tokenizer"
    return None


def _of_data(config: Config, model_config: PretrainedConfig) -> Lengths:
    config = replace(config, data=replace(config.data, eval=[]))
    data = prepare_data(config, model_config)
    order, last_step, _ = make_order(config, data)
    return lengths_of_pairs(config, data.train, order, last_step)


def lengths_of_pairs(config: Config, train: PairSet, order: PairOrder, last_step: int) -> Lengths:
    """The trees of some steps of a run, evenly spread over its first epoch, and of its longest pairs."""
    last = max(1, min(last_step, order.num_pairs // order.pairs_per_step))
    numbers = np.unique(np.linspace(1, last, NUM_STEPS).round().astype(int))
    steps = tuple(tuple(grow_trees(train.pairs(order.items(int(number))))) for number in numbers)
    longest = tuple(grow_trees(train.pairs(_longest_pairs(train, config))))
    said = f"those of the data, {len(steps)} of the first {last:,} steps; for memory, its longest pairs in one step"
    return Lengths(steps, longest, said)


def _longest_pairs(pairs: PairSet, config: Config) -> np.ndarray:
    """As many pairs as a step has, those of the most tokens; where pairs of a prompt come together, those of the
    prompts with the most.
    """
    tokens = pairs.lengths().sum(1)
    if config.batch.group_by_prompt:
        prompts = np.asarray(pairs.prompt_of_pair)
        tokens = np.bincount(prompts, tokens)[prompts]
    return np.argsort(-tokens, kind="stable")[: config.batch.pairs_per_step]


def _equal_trees(count: int, prompt: int, completion: int) -> tuple[Tree, ...]:
    ids = np.zeros(max(prompt, completion), np.int32)
    return (Tree(ids[:prompt], (ids[:completion], ids[:completion]), ((0, 1),)),) * count


MicroBatch = tuple[StepPlan, tuple[Tree, ...]]
"""A micro-batch's trees and its step's plan."""


def largest_micro_batches(plans: Sequence[StepPlan]) -> list[MicroBatch]:
    """One of these needs the most memory: the one of most tokens of those that share a step with others, beside whose
    activations gradients lie, or the one of most tokens of those that are alone, if that has more.
    """
    every = [(plan, trees) for plan in plans for rank in plan.micro_batches for trees in rank]
    shared = [one for one in every if one[0].num_micro_batches > 1]
    found = [max(some, key=_tokens) for some in (shared, every) if some]
    return found[:1] if len(found) == 2 and _tokens(found[0]) == _tokens(found[1]) else found


def _tokens(micro_batch: MicroBatch) -> int:
    return sum(tree.num_tokens for tree in micro_batch[1])
