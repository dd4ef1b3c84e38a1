"""FlexAttention's mask of packed trees against its definition, its blocks against torch's `create_block_mask`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dpo.batch.block_mask import Span, Window, host_mask, key_runs, tree_mask_mod
from tests.support.trees import TREES, dense_mask, spans_of, tokens_of

CPU = torch.device("cpu")

PICTURE = """
P x......
P xx.....
A xxx....
A .xxx...
B xx..x..
Q .....x.
C .....xx
"""
"""Prompt P of 2 tokens with completions A of 2 and B of 1, prompt Q of 1 with completion C of 1, and a window of 3: A's
second token stands at position 3 and sees positions 1 to 3; B's at position 2 sees 0 to 2.
"""


def evaluated(spans: Sequence[Span], window: Window) -> Tensor:
    """FlexAttention's mask_mod for every query and key: (L, L)."""
    runs = torch.from_numpy(key_runs(spans, window))
    places, zero = torch.arange(runs.shape[1]), torch.zeros((), dtype=torch.long)
    return tree_mask_mod(runs)(zero, zero, places[:, None], places[None, :])


def test_the_mask_by_hand() -> None:
    mask = evaluated(spans_of([(2, (2, 1)), (1, (1,))]), 3)
    drawn = ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]
    assert drawn == [line.split()[1] for line in PICTURE.strip().splitlines()]


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
def test_the_mask_is_the_definition(trees: Any, window: Window) -> None:
    assert torch.equal(evaluated(spans_of(trees), window), dense_mask(trees, window))


@settings(max_examples=40, deadline=None)
@given(
    trees=st.lists(
        st.tuples(st.integers(1, 300), st.lists(st.integers(0, 260), max_size=5).map(tuple)), min_size=1, max_size=5
    ),
    window=st.one_of(st.none(), st.integers(1, 500)),
)
@example(trees=[(128, (127,)), (1, ())], window=None)  # all queries of a block but one see a block whole
@example(trees=[(200, (0, 100, 200))], window=130)
def test_every_block_is_torch_s(trees: Any, window: Window) -> None:
    """Of random trees, also with empty completions, with or without a window, at lengths that are no multiple of 128,
    the eight tensors are those that `create_block_mask` finds from the (L, L) mask.
    """
    found = host_mask(spans_of(trees), window, pin=False).to(CPU)
    length = len(tokens_of(trees))
    dense = dense_mask(trees, window)
    wanted = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, length, length, device="cpu")
    for name in BlockMask._TENSOR_ATTRS[:8]:
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), name
    assert (found.seq_lengths, found.BLOCK_SIZE) == (wanted.seq_lengths, wanted.BLOCK_SIZE)
    for mask in (found, wanted):
        assert getattr(mask, "dq_write_order", None) is None  # torch 2.11 does not know it


def test_blocks_of_other_trees_are_skipped() -> None:
    """Two trees of 256 tokens, blocks of 128: of 16 blocks each tree has 3 on or below its diagonal, 6 in all. The
    second completion of the first tree stands in the tree's second half, so that it also meets the prompt in the
    first. Seen whole are the first half of the second tree by its second half, and the prompt of the first tree.
    """
    mask = host_mask(spans_of([(128, (64, 64)), (256, ())]), None, pin=False).to(CPU)
    assert mask.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 0, 1]
    assert mask.full_kv_indices[0, 0, [1, 3], 0].tolist() == [0, 2]


def test_rows_of_one_length_have_masks_of_one_shape() -> None:
    """What torch.compile guards: shapes, dtypes and strides, and the code of mask_mod, with a window or without."""

    def guarded(mask: BlockMask) -> list[Any]:
        tensors = [getattr(mask, name) for name in BlockMask._TENSOR_ATTRS[:8]]
        tensors += [cell.cell_contents for cell in mask.mask_mod.__closure__]
        return [mask.mask_mod.__code__, *((t.shape, t.dtype, t.stride()) for t in tensors)]

    some = host_mask(spans_of([(100, (30, 40, 86))]), None, pin=False).to(CPU)
    other = host_mask(spans_of([(1, (2,)) for _ in range(80)] + [(16, ())]), 7, pin=False).to(CPU)
    assert guarded(some) == guarded(other)


def test_two_runs_of_keys_never_meet() -> None:
    """What lets a whole block be counted by one run alone, on 200 random rows."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        trees = [(int(rng.integers(1, 9)), tuple(rng.integers(0, 4, 4).tolist())) for _ in range(3)]
        prompt_from, prompt_end, own_from = key_runs(spans_of(trees), None)
        apart = prompt_end > prompt_from
        assert (prompt_end[apart] < own_from[apart]).all()
