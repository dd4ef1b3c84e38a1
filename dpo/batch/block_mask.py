"""FlexAttention's mask of a packed row of trees, made on the host block by block, without an (L x L) array.

A query sees at most two runs of keys: its prompt (or, with a window, the end of it), and its own completion up to
itself. The first completion stands right after its prompt, so that both are one run. Three places per query therefore
describe the whole mask, with a window too (`key_runs`). For the row of `packing`:

    place          0 1 2   3 4   5 6 7 | 8 9   10 11 12
    token          p p p   a a   b b b | q q    c  c  c
    prompt_from    0 0 0   0 0   0 0 0 | 8 8    8  8  8    the query sees the keys from `prompt_from`
    prompt_end     0 0 0   0 0   3 3 3 | 8 8    8  8  8    to before `prompt_end`
    own_from       0 0 0   0 0   5 5 5 | 8 8    8  8  8    and from `own_from` to itself

`classify_blocks` counts from the ends of the runs whether a block of 128 queries and 128 keys is empty (skipped), full
(computed without a mask) or partial (computed with `tree_mask_mod`): a millisecond for 16,384 tokens. A prompt of 128
tokens with two completions of 128 has three blocks of queries (down) by three blocks of keys (across):

                       prompt    first     second
    prompt             partial   empty     empty
    first completion   full      partial   empty
    second completion  full      empty     partial
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries, and keys, of a block: FlexAttention's default. The length of a packed row on CUDA is a multiple of it."""

Window = int | None
"""The number of keys that a query may see, itself included, counted in positions; None is no limit."""


@dataclass(frozen=True)
class Span:
    """The place of one tree in a packed row: its prompt begins at `start`, and its completions follow."""

    start: int
    prompt_len: int
    completion_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Returns the tokens of the tree."""
        return self.prompt_len + sum(self.completion_lens)


@dataclass(frozen=True)
class HostMask:
    """The mask of a row of L tokens, which are N = L / BLOCK (rounded up) blocks, in host memory."""

    key_runs: Tensor
    """(3, L) int32, see `key_runs`."""
    blocks: dict[str, Any]
    """The tensors of a BlockMask by name, int32: counts of blocks (1, 1, N) and their indices (1, 1, N, N)."""

    def to(self, device: torch.device) -> BlockMask:
        """Returns the mask on a device; the host does not wait for the copies (`BlockMask.to` would).

        The masks of all rows of one length have the same code and tensors of the same shapes, so that a kernel that was
        compiled for one of these masks runs them all.
        """
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.blocks.items()}
        num_tokens = self.key_runs.shape[1]
        mask_mod = tree_mask_mod(self.key_runs.to(device, non_blocking=True))
        return BlockMask((num_tokens, num_tokens), **moved, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)


def host_mask(spans: Sequence[Span], window: Window, pin: bool) -> HostMask:
    """Returns the mask of the row that the spans cover.

    Args:
        spans: the places of the trees, which cover the row of L tokens.
        window: the attention window, in keys; None is no limit.
        pin: whether to pin the tensors, for copies to CUDA that the host does not wait for.
    """

    def put(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
        return tensor.pin_memory() if pin else tensor

    runs = key_runs(spans, window)
    partial, full = classify_blocks(runs)
    blocks = {}
    for prefix, table in (("", partial), ("full_", full)):
        for axis, is_listed in (("kv", table), ("q", table.T)):
            # FlexAttention reads the first `num_blocks` indices of a row: True blocks sort before False ones.
            blocks[f"{prefix}{axis}_num_blocks"] = put(is_listed.sum(1)[None, None])
            blocks[f"{prefix}{axis}_indices"] = put(np.argsort(~is_listed, axis=1, kind="stable")[None, None])
    return HostMask(put(runs), blocks)


def tree_mask_mod(runs: Tensor) -> Callable[..., Tensor]:
    """Returns FlexAttention's mask_mod of a row with these `key_runs` (3, L), which lie on the queries' device."""
    prompt_from, prompt_end, own_from = runs.unbind()

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((k >= own_from[q]) | ((k >= prompt_from[q]) & (k < prompt_end[q])))

    return mask_mod


def key_runs(spans: Sequence[Span], window: Window) -> np.ndarray:
    """Returns the places `prompt_from`, `prompt_end` and `own_from`, (3, L).

    The query at place q sees the keys from `prompt_from[q]` to before `prompt_end[q]`, and from `own_from[q]` to q. The
    two runs never touch: at least one key lies between them, or the first run is empty.
    """
    runs = np.array([run for span in spans for run in _runs(span)], dtype=np.int64).reshape(-1, 4)
    lengths = runs[:, 1]
    own_from, _, prompt_from, prompt_len = np.repeat(runs, lengths, axis=0).T
    prompt_end = prompt_from + prompt_len
    if window is not None:
        place = np.arange(len(own_from))
        prompt_from = np.maximum(prompt_from, prompt_end + place - own_from - window + 1)
        own_from = np.maximum(own_from, place - window + 1)
    return np.stack([prompt_from, prompt_end, own_from])


def _runs(span: Span) -> list[tuple[int, int, int, int]]:
    """Returns, for the prompt and for each completion, (place where its own run of keys begins, its tokens, place where
    the prompt's run begins, tokens of the prompt's run). A completion right after the prompt extends the prompt's run.
    """
    prompt_end = place = span.start + span.prompt_len
    runs = [(span.start, span.prompt_len, span.start, 0)]
    for length in span.completion_lens:
        two_runs = (place, length, span.start, span.prompt_len)
        runs.append((span.start, length, span.start, 0) if place == prompt_end else two_runs)
        place += length
    return runs


def classify_blocks(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which blocks are partial and which are full, (N, N) bool each, blocks of queries by blocks of keys.

    Args:
        runs: (3, L), see `key_runs`. A block that extends beyond the end of the row is never full.
    """
    prompt_from, prompt_end, own_from = runs
    place = np.arange(runs.shape[1])
    prompt_blocks_end = np.where(prompt_end > prompt_from, -(-prompt_end // BLOCK), 0)
    touched = _count(prompt_from // BLOCK, prompt_blocks_end) + _count(own_from // BLOCK, place // BLOCK + 1)
    # The two runs of a query never touch, so a query that sees a whole block sees it in one of the runs alone.
    covered = _count(-(-prompt_from // BLOCK), prompt_end // BLOCK)
    covered += _count(-(-own_from // BLOCK), (place + 1) // BLOCK)
    full = covered == BLOCK
    return (touched > 0) & ~full, full


def _count(first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Returns, per block of queries and block of keys (N, N), how many of the queries have that block of keys in their
    range of blocks, from `first` (L,) to before `end` (L,).
    """
    num_blocks = -(-len(first) // BLOCK)
    size = num_blocks * (num_blocks + 1)
    row = np.arange(len(first)) // BLOCK * (num_blocks + 1)
    # +1 where the range of a query begins and -1 where it ends, then the running sum over blocks of keys. An empty
    # range adds +1 and -1 at the same place.
    steps = np.bincount(row + first, minlength=size) - np.bincount(row + np.maximum(first, end), minlength=size)
    return steps.reshape(num_blocks, num_blocks + 1).cumsum(1)[:, :-1]
