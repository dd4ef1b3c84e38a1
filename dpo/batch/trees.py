"""Pairs -> trees: each prompt once, with each of its completions once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo.data.pair_set import Pair


@dataclass(frozen=True)
class Tree:
    """A prompt, the completions of it that a step needs (each once), and the (winner, loser) pairs among them."""

    prompt_ids: np.ndarray
    completion_ids: tuple[np.ndarray, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def num_scored(self) -> int:
        """Tokens of the completions: the rows that the head computes."""
        return sum(len(ids) for ids in self.completion_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that the body computes: the prompt once and every completion once."""
        return len(self.prompt_ids) + self.num_scored

    @property
    def num_attended(self) -> int:
        """(query, key) pairs that attention must look at: P(P+1)/2 in the prompt, C*P + C(C+1)/2 for each
        completion.
        """
        prompt = len(self.prompt_ids)
        return prompt * (prompt + 1) // 2 + sum(
            len(ids) * prompt + len(ids) * (len(ids) + 1) // 2 for ids in self.completion_ids
        )


def grow_trees(pairs: Sequence[Pair]) -> list[Tree]:
    """The trees of some pairs, in the order in which their prompts come first.

    Prompts are one when their ids are equal, and so are completions under one prompt. A pair that comes twice counts
    twice and runs once.
    """
    trunks: dict[bytes, np.ndarray] = {}
    branches: dict[bytes, dict[bytes, np.ndarray]] = {}
    marks: dict[bytes, list[tuple[bytes, bytes]]] = {}
    for pair in pairs:
        key, chosen, rejected = pair.prompt_ids.tobytes(), pair.chosen_ids.tobytes(), pair.rejected_ids.tobytes()
        trunks.setdefault(key, pair.prompt_ids)
        known = branches.setdefault(key, {})
        known.setdefault(chosen, pair.chosen_ids)
        known.setdefault(rejected, pair.rejected_ids)
        marks.setdefault(key, []).append((chosen, rejected))
    return [_tree(prompt_ids, branches[key], marks[key]) for key, prompt_ids in trunks.items()]


def _tree(prompt_ids: np.ndarray, completions: dict[bytes, np.ndarray], pairs: list[tuple[bytes, bytes]]) -> Tree:
    index = {key: number for number, key in enumerate(completions)}
    return Tree(prompt_ids, tuple(completions.values()), tuple((index[w], index[lo]) for w, lo in pairs))
