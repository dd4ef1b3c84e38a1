"""How many tokens a step computes, and how many a shared prompt saves: whole steps of a run, in its own order."""

from dataclasses import dataclass

import numpy as np

from dpo.batch.order import PairOrder
from dpo.batch.trees import grow_trees
from dpo.data.pair_set import PairSet

NUM_STEPS = 64  # at most, that are looked at


@dataclass(frozen=True)
class StepTokens:
    """Tokens of whole steps, computed in three ways; means over the steps that were looked at."""

    steps: int
    """How many were looked at: all of the first epoch, or NUM_STEPS of them, evenly spread."""
    padded: float
    """Every chosen and every rejected row, its prompt in front, padded to the longest of the step."""
    unpadded: float
    """The same without padding."""
    shared: float
    """As this trainer computes it: a prompt once, each of its completions once."""
    least: int
    most: int
    """Of `shared`, over those steps."""
    trees: float
    """Different prompts a step."""
    largest_tree: int
    """Tokens of the largest prompt with its completions; above batch.tokens_per_micro_batch it runs alone."""

    def saved(self, other: float) -> float:
        """The share of the tokens `padded` or `unpadded` that need not be computed."""
        return 1 - self.shared / other


def step_tokens(train: PairSet, order: PairOrder, last_step: int) -> StepTokens:
    """Of whole steps of the first epoch, in the order of the run, which ends with `last_step`."""
    last = min(last_step, order.num_pairs // order.pairs_per_step)
    steps = np.unique(np.linspace(1, last, NUM_STEPS).round().astype(int))
    rows = np.array([_tokens_of_step(train, order.items(int(step))) for step in steps])
    padded, unpadded, shared, trees, _ = rows.mean(0).tolist()
    least, most, largest = rows[:, 2].min(), rows[:, 2].max(), rows[:, 4].max()
    return StepTokens(len(steps), padded, unpadded, shared, int(least), int(most), trees, int(largest))


def _tokens_of_step(train: PairSet, ids: np.ndarray) -> tuple[int, int, int, int, int]:
    """(padded, unpadded, shared tokens, trees, tokens of the largest tree) of the pairs of one step."""
    pairs = train.pairs(ids)
    lengths = [len(pair.prompt_ids) + len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    trees = [tree.num_tokens for tree in grow_trees(pairs)]
    return len(lengths) * max(lengths), sum(lengths), sum(trees), len(trees), max(trees)
