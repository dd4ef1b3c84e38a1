"""Counts the tokens that a step computes and the tokens that shared prompts save, over whole steps in the run's own
order.

For example, a step of two pairs with one prompt of 10 tokens and four different completions of 4, 2, 2 and 3 tokens:

    padded      4 rows of 10 + 4            56 tokens
    unpadded    14 + 12 + 12 + 13           51
    shared      10 + 4 + 2 + 2 + 3          21
"""

from dataclasses import dataclass

import numpy as np

from dpo.batch.order import PairOrder
from dpo.batch.trees import grow_trees
from dpo.pairs.pair_set import PairSet

NUM_STEPS = 64  # maximum number of steps that are counted


@dataclass(frozen=True)
class StepTokens:
    """Tokens of whole steps computed in three ways, as means over the steps that were counted."""

    steps: int
    """Number of steps that were counted: all of the first epoch, or NUM_STEPS of them, evenly spread."""
    padded: float
    """Every winner and every loser after its prompt, padded to the longest of the step."""
    unpadded: float
    """The same without padding."""
    shared: float
    """As this trainer computes it: each prompt once, each completion once."""
    minimum: int
    maximum: int
    """Of `shared`, over these steps."""
    trees: float
    """Different prompts per step."""
    largest_tree: int
    """Tokens of the largest prompt with its completions; above `batch.tokens_per_micro_batch` it is a micro-batch
    alone.
    """

    def saved(self, other: float) -> float:
        """Returns the share of `other`, which is `padded` or `unpadded`, that need not be computed."""
        return 1 - self.shared / other


def step_tokens(train: PairSet, order: PairOrder, last_step: int) -> StepTokens:
    """Returns the tokens of whole steps of the first epoch, in the order of the run.

    Args:
        train: the training pairs.
        order: the order in which the run takes them.
        last_step: the number of steps of the run.
    """
    last = min(last_step, order.num_pairs // order.pairs_per_step)
    steps = np.unique(np.linspace(1, last, NUM_STEPS).round().astype(int))
    rows = np.array([_tokens_of_step(train, order.items(int(step))) for step in steps])
    padded, unpadded, shared, trees, _ = rows.mean(0).tolist()
    minimum, maximum, largest = rows[:, 2].min(), rows[:, 2].max(), rows[:, 4].max()
    return StepTokens(len(steps), padded, unpadded, shared, int(minimum), int(maximum), trees, int(largest))


def _tokens_of_step(train: PairSet, ids: np.ndarray) -> tuple[int, int, int, int, int]:
    """Returns (padded, unpadded, shared tokens, trees, tokens of the largest tree) of the pairs of one step."""
    pairs = train.pairs(ids)
    sides = ("chosen_ids", "rejected_ids") if train.has_losers else ("chosen_ids",)
    lengths = [len(pair.prompt_ids) + len(getattr(pair, side)) for pair in pairs for side in sides]
    trees = [tree.num_tokens for tree in grow_trees(pairs)]
    return len(lengths) * max(lengths), sum(lengths), sum(trees), len(trees), max(trees)
