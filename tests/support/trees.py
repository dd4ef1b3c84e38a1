"""Trees of a packed row, and the definition of what a token of it sees."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo.batch.block_mask import Span, Window

TREES = {
    "one completion": [(5, (3,))],
    "several completions": [(5, (3, 7, 1, 4))],
    "several trees": [(3, (2, 5)), (1, (1,)), (9, (4, 4, 6)), (1, (3, 1))],
    "no completion": [(4, ()), (3, (2, 2))],
    "an empty completion": [(4, (0, 3, 0)), (3, (2,))],
}
"""(tokens of the prompt, tokens of each completion) of the trees of a row."""


def spans_of(trees: Sequence[tuple[int, tuple[int, ...]]]) -> list[Span]:
    starts = itertools.accumulate((prompt + sum(rest) for prompt, rest in trees), initial=0)
    return [Span(start, prompt, rest) for start, (prompt, rest) in zip(starts, trees, strict=False)]


def tokens_of(trees: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[int, int, int]]:
    """(tree, 0 or the number of the completion from 1, position) of every token of the row."""
    tokens = []
    for tree, (prompt, rest) in enumerate(trees):
        tokens += [(tree, 0, position) for position in range(prompt)]
        for number, length in enumerate(rest, start=1):
            tokens += [(tree, number, prompt + position) for position in range(length)]
    return tokens


def dense_mask(trees: Sequence[tuple[int, tuple[int, ...]]], window: Window) -> Tensor:
    """The definition, (L, L): a token sees its prompt and its own completion, itself and what stands before it, at most
    `window` positions counting itself.
    """
    tree, owner, position = torch.tensor(tokens_of(trees)).T
    own = (tree[:, None] == tree) & ((owner == 0) | (owner[:, None] == owner))
    distance = position[:, None] - position
    return own & (distance >= 0) & (distance < (window or len(tree)))
