"""The trees of some steps: those of the data where it can be read here, else of lengths that are given or assumed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from dpo.config import Config
from dpo.data import prepare_data
from dpo.errors import UserError
from dpo.inputs import make_order
from dpo.plan import StepPlan, Tree, grow_trees
from dpo.tokens import has_tokenizer

NUM_STEPS = 16  # of the data that are looked at, evenly spread


@dataclass(frozen=True)
class Lengths:
    """What is computed in a step."""

    steps: tuple[tuple[Tree, ...], ...]
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
            "command line: --prompt-tokens, --completion-tokens: are needed where the data is not read and"
            " data.max_length is null; valid: both, in tokens"
        )
    said = f"prompts of {prompt:,} and two completions of {completion:,} tokens, {missing}"
    return Lengths((_equal_trees(config.batch.pairs_per_step, prompt, completion),), said)


def _what_is_missing(config: Config) -> str | None:
    """Why the data cannot be read here; None where it can."""
    for source in config.data.train:
        if not Path(source.path).exists():
            return f"assumed: {source.path} is not here"
    tokenizer = config.model.tokenizer or config.model.path
    if not has_tokenizer(Path(tokenizer)) and any(source.format != "tokens" for source in config.data.train):
        return f"assumed: {tokenizer} has no tokenizer"
    return None


def _of_data(config: Config, model_config: PretrainedConfig) -> Lengths:
    config = replace(config, data=replace(config.data, eval=[]))
    data = prepare_data(config, model_config)
    train, (order, last_step, _) = data.train, make_order(config, data)
    last = max(1, min(last_step, order.num_pairs // order.pairs_per_step))
    numbers = np.unique(np.linspace(1, last, NUM_STEPS).round().astype(int))
    steps = tuple(tuple(grow_trees(train.pairs(order.items(int(number))))) for number in numbers)
    return Lengths(steps, f"those of the data, {len(steps)} of the first {last:,} steps")


def _equal_trees(count: int, prompt: int, completion: int) -> tuple[Tree, ...]:
    ids = np.zeros(max(prompt, completion), np.int32)
    return (Tree(ids[:prompt], (ids[:completion], ids[:completion]), ((0, 1),)),) * count


def largest_micro_batch(plans: Sequence[StepPlan]) -> tuple[StepPlan, tuple[Tree, ...]]:
    """The micro-batch that needs the most memory, and its step's plan: one of several that share a step before one that
    is alone, then the one of most tokens.
    """
    every = [(plan, trees) for plan in plans for rank in plan.micro_batches for trees in rank]
    return max(every, key=lambda one: (min(one[0].num_micro_batches, 2), sum(tree.num_tokens for tree in one[1])))
