"""Pairs -> trees: each prompt once, with each of its completions once.

An example: three pairs (winner, loser) of a step, with prompts p and q and completions a to e

    p: a > b     q: d > e     p: c > b

become two trees. The step computes p once, and b once although it is in two pairs:

    Tree(p, (a, b, c), pairs ((0, 1), (2, 1)))     Tree(q, (d, e), pairs ((0, 1),))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo.pairs.pair_set import Pair


@dataclass(frozen=True)
class Tree:
    """A prompt, its completions that a step needs (each once), and the pairs among them."""

    prompt_ids: np.ndarray
    """(P,) int32."""
    completion_ids: tuple[np.ndarray, ...]
    """(C_k,) int32 each."""
    pairs: tuple[tuple[int, int], ...]
    """(winner, loser), indices of `completion_ids`."""
    weights: tuple[float, ...] = ()
    """The weight of each pair; empty where all are 1."""
    margins: tuple[float, ...] = ()
    """The margin of each pair; empty where all are 0."""
    pair_ids: tuple[int, ...] = ()
    """The id of each pair in its `PairSet`; empty where the pairs are of no set."""

    @property
    def num_scored(self) -> int:
        """Returns the tokens of the completions: the rows of hidden states that the head computes."""
        return sum(len(ids) for ids in self.completion_ids)

    @property
    def num_tokens(self) -> int:
        """Returns the tokens that the body computes: the prompt once and every completion once."""
        return len(self.prompt_ids) + self.num_scored

    @property
    def num_attended(self) -> int:
        """Returns the number of (query, key) pairs that attention computes: P(P+1)/2 in the prompt and C*P + C(C+1)/2
        per completion.
        """
        prompt = len(self.prompt_ids)
        return prompt * (prompt + 1) // 2 + sum(
            len(ids) * prompt + len(ids) * (len(ids) + 1) // 2 for ids in self.completion_ids
        )


def grow_trees(pairs: Sequence[Pair]) -> list[Tree]:
    """Returns the trees of the pairs, in the order in which their prompts first appear.

    Pairs with equal prompt ids share a tree, and completions with equal ids under a prompt share a branch. A pair that
    is given twice counts twice in the loss, and is computed once.
    """
    prompts: dict[bytes, np.ndarray] = {}
    completions: dict[bytes, dict[bytes, np.ndarray]] = {}
    preferences: dict[bytes, list[Pair]] = {}
    for pair in pairs:
        key = pair.prompt_ids.tobytes()
        prompts.setdefault(key, pair.prompt_ids)
        branches = completions.setdefault(key, {})
        branches.setdefault(pair.chosen_ids.tobytes(), pair.chosen_ids)
        branches.setdefault(pair.rejected_ids.tobytes(), pair.rejected_ids)
        preferences.setdefault(key, []).append(pair)
    return [_tree(prompt_ids, completions[key], preferences[key]) for key, prompt_ids in prompts.items()]


def _tree(prompt_ids: np.ndarray, completions: dict[bytes, np.ndarray], pairs: list[Pair]) -> Tree:
    """Returns the tree of the pairs of a prompt; `completions` has their completions by the bytes of their ids."""
    index = {key: number for number, key in enumerate(completions)}
    indices = tuple((index[pair.chosen_ids.tobytes()], index[pair.rejected_ids.tobytes()]) for pair in pairs)
    weights, margins = (tuple(getattr(pair, name) for pair in pairs) for name in ("weight", "margin"))
    pair_ids = tuple(pair.id for pair in pairs if pair.id is not None)
    return Tree(
        prompt_ids,
        tuple(completions.values()),
        indices,
        weights if any(weight != 1 for weight in weights) else (),
        margins if any(margins) else (),
        pair_ids,
    )
