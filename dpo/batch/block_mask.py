"""FlexAttention's mask of a packed row of trees, made on the host block by block, never of (L x L).

A query sees two runs of keys: some of its prompt, and its own completion up to itself (a prompt, or a prompt with its
first completion, is one run). So three numbers a query say all, with a window too, and whether a block of 128 queries
and 128 keys is empty, full or neither is counted from the runs' ends: a millisecond for 16,384 tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries and keys of a block, FlexAttention's own default; also what packed rows on CUDA are multiples of."""

Window = int | None
"""Keys a query may see, itself included, counted in positions; None is all."""


@dataclass(frozen=True)
class Span:
    """Where one tree lies in the packed row: it starts at `start` with a prompt, its completions follow."""

    start: int
    prompt_len: int
    completion_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the tree."""
        return self.prompt_len + sum(self.completion_lens)


@dataclass(frozen=True)
class HostMask:
    """The mask of a row of L tokens in N = L / BLOCK (rounded up) blocks, in the memory of the host."""

    key_runs: Tensor
    """(3, L) int32, see `key_runs`."""
    blocks: dict[str, Any]
    """The tensors of a BlockMask by name: (1, 1, N) numbers of blocks, (1, 1, N, N) their indices, int32."""

    def to(self, device: torch.device) -> BlockMask:
        """The mask on a device; the host does not wait for the copies (`BlockMask.to` would).

        All masks of rows of one length have tensors of the same shapes and the same code, so that what was compiled for
        one runs them all.
        """
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.blocks.items()}
        num_tokens = self.key_runs.shape[1]
        mask_mod = tree_mask_mod(self.key_runs.to(device, non_blocking=True))
        return BlockMask((num_tokens, num_tokens), **moved, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)


def host_mask(spans: Sequence[Span], window: Window, pin: bool) -> HostMask:
    """The mask of the row that the spans cover, its tensors pinned where it is meant for CUDA."""

    def put(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
        return tensor.pin_memory() if pin else tensor

    runs = key_runs(spans, window)
    partial, full = classify_blocks(runs)
    blocks = {}
    for prefix, table in (("", partial), ("full_", full)):
        for axis, rows in (("kv", table), ("q", table.T)):
            # The numbers of a row's blocks, first those that it has: a stable sort of "has not".
            blocks[f"{prefix}{axis}_num_blocks"] = put(rows.sum(1)[None, None])
            blocks[f"{prefix}{axis}_indices"] = put(np.argsort(~rows, axis=1, kind="stable")[None, None])
    return HostMask(put(runs), blocks)


def tree_mask_mod(runs: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod of a row with these `key_runs`, on their device."""
    prompt_from, prompt_end, own_from = runs.unbind()

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((k >= own_from[q]) | ((k >= prompt_from[q]) & (k < prompt_end[q])))

    return mask_mod


def key_runs(spans: Sequence[Span], window: Window) -> np.ndarray:
    """(3, L) places `prompt_from`, `prompt_end`, `own_from`: the query at place q sees the keys from `prompt_from[q]`
    to before `prompt_end[q]`, and from `own_from[q]` to q. No key is in both runs, and between them lies at least one.
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
    """(start of its own run of keys, tokens, start of the prompt apart from it, tokens of that prompt) of the prompt
    and of each completion; one that stands right behind the prompt goes on with the prompt's run.
    """
    prompt_end = place = span.start + span.prompt_len
    runs = [(span.start, span.prompt_len, span.start, 0)]
    for length in span.completion_lens:
        apart = (place, length, span.start, span.prompt_len)
        runs.append((span.start, length, span.start, 0) if place == prompt_end else apart)
        place += length
    return runs


def classify_blocks(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, N) bools each, blocks of queries by blocks of keys: those that are seen in part, and those that are seen
    whole, from `key_runs`. A block that reaches over the row's end is never whole.
    """
    prompt_from, prompt_end, own_from = runs
    place = np.arange(runs.shape[1])
    prompt_blocks_end = np.where(prompt_end > prompt_from, -(-prompt_end // BLOCK), 0)
    touched = _count(prompt_from // BLOCK, prompt_blocks_end) + _count(own_from // BLOCK, place // BLOCK + 1)
    # The runs of a query never meet, so one of them alone covers what it sees of a whole block.
    covered = _count(-(-prompt_from // BLOCK), prompt_end // BLOCK)
    covered += _count(-(-own_from // BLOCK), (place + 1) // BLOCK)
    full = covered == BLOCK
    return (touched > 0) & ~full, full


def _count(first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(N, N): how many queries of a block have a block of keys among their blocks `first` to before `end`, (L,)."""
    num_blocks = -(-len(first) // BLOCK)
    size = num_blocks * (num_blocks + 1)
    row = np.arange(len(first)) // BLOCK * (num_blocks + 1)
    # +1 where a query's blocks begin, -1 where they end, and the running sum over the keys; none is +1 - 1.
    steps = np.bincount(row + first, minlength=size) - np.bincount(row + np.maximum(first, end), minlength=size)
    return steps.reshape(num_blocks, num_blocks + 1).cumsum(1)[:, :-1]
