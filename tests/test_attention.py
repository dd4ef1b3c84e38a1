"""Shared-prefix attention against a dense masked softmax, and FlexAttention's mask against the same definition."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from dpo.attention import (
    Layout,
    Span,
    Window,
    block_mask,
    make_layout,
    register_attention,
    segment_attention,
    tree_attention,
    tree_mask_mod,
)
from dpo.errors import UserError

CPU = torch.device("cpu")
WIDTH = 8

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


def sees(query: tuple[int, int, int], key: tuple[int, int, int], window: Window) -> bool:
    """The definition: a token sees its prompt and its own completion, itself and what stands before it, at most
    `window` positions counting itself.
    """
    distance = query[2] - key[2]
    own = query[0] == key[0] and key[1] in (0, query[1])
    return own and distance >= 0 and (window is None or distance < window)


def dense_mask(trees: Sequence[tuple[int, tuple[int, ...]]], window: Window) -> Tensor:
    tokens = tokens_of(trees)
    return torch.tensor([[sees(query, key, window) for key in tokens] for query in tokens])


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, -inf where masked) v, head by head; each kv head serves several heads of queries."""
    groups = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = scale * query[0, head] @ key[0, head // groups].T
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        heads.append(weights @ value[0, head // groups])
    return torch.stack(heads)[None]


def random_qkv(length: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, WIDTH), (1, kv_heads, length, WIDTH), (1, kv_heads, length, WIDTH)]
    return [torch.randn(shape, generator=random, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
def test_the_segment_loop_is_dense_attention(trees: Any, window: Window, kv_heads: int) -> None:
    """Values and gradients in float64, grouped and multi-query too, at a scale that is not the default."""
    query, key, value = random_qkv(len(tokens_of(trees)), 4, kv_heads)
    layout = make_layout(spans_of(trees), [window], query.shape[2], CPU)
    found = segment_attention(query, key, value, layout, window, 0.2)
    wanted = dense_attention(query, key, value, dense_mask(trees, window), 0.2)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64)
    found = torch.autograd.grad((found * weights).sum(), (query, key, value))
    wanted = torch.autograd.grad((wanted * weights).sum(), (query, key, value))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_default_scale_is_one_over_the_root_of_the_width() -> None:
    trees = TREES["several trees"]
    query, key, value = random_qkv(len(tokens_of(trees)), 2, 2)
    layout = make_layout(spans_of(trees), [None], query.shape[2], CPU)
    wanted = dense_attention(query, key, value, dense_mask(trees, None), WIDTH**-0.5)
    torch.testing.assert_close(segment_attention(query, key, value, layout, None, None), wanted)


# --- FlexAttention ---------------------------------------------------------------------------------------------------

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


def evaluated(spans: Sequence[Span], window: Window, num_tokens: int) -> Tensor:
    """FlexAttention's mask_mod for every query and key: (L, L)."""
    places = torch.arange(num_tokens)
    zero = torch.zeros((), dtype=torch.long)
    return tree_mask_mod(spans, window, num_tokens, CPU)(zero, zero, places[:, None], places[None, :])


def test_the_mask_by_hand() -> None:
    mask = evaluated(spans_of([(2, (2, 1)), (1, (1,))]), 3, 7)
    drawn = ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]
    assert drawn == [line.split()[1] for line in PICTURE.strip().splitlines()]


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
def test_the_mask_is_the_definition(trees: Any, window: Window) -> None:
    assert torch.equal(evaluated(spans_of(trees), window, len(tokens_of(trees))), dense_mask(trees, window))


@pytest.mark.parametrize("window", [None, 3])
def test_padding_sees_padding_alone(window: Window) -> None:
    """Four tokens behind the last tree: no row of the softmax is empty, and no real token sees them or is seen."""
    trees = TREES["several trees"]
    length = len(tokens_of(trees))
    mask = evaluated(spans_of(trees), window, length + 4)
    assert torch.equal(mask[:length, :length], dense_mask(trees, window))
    assert not mask[:length, length:].any()
    assert not mask[length:, :length].any()
    assert mask.any(1).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_is_the_segment_loop(window: Window, kv_heads: int) -> None:
    """Forward on a CPU with the block mask, uncompiled: 2 blocks of 128 tokens, a tree across their border."""
    trees = [(60, (40, 70, 3)), (9, (4, 4, 6))]
    spans = spans_of(trees)
    query, key, value = (x.detach() for x in random_qkv(len(tokens_of(trees)), 4, kv_heads, torch.float32))
    mask = block_mask(spans, window, query.shape[2], CPU)
    found = flex_attention(query, key, value, block_mask=mask, scale=0.2, enable_gqa=kv_heads != 4)
    layout = make_layout(spans, [window], query.shape[2], CPU)
    torch.testing.assert_close(found, segment_attention(query, key, value, layout, window, 0.2), rtol=1e-5, atol=1e-6)


def test_the_block_mask_skips_blocks_of_other_trees() -> None:
    """Two trees of 256 tokens, blocks of 128: of 16 blocks each tree has 3 on or below its diagonal, 6 in all. The
    second completion of the first tree stands in the tree's second half, so that it also meets the prompt in the
    first.
    """
    mask = block_mask(spans_of([(128, (64, 64)), (256, ())]), None, 512, CPU)
    assert mask.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


# --- what transformers calls -----------------------------------------------------------------------------------------


def test_transformers_gets_length_before_heads() -> None:
    """(1, L, heads, D), and dropout is ignored."""
    trees = TREES["several trees"]
    query, key, value = random_qkv(len(tokens_of(trees)), 4, 2)
    layout = make_layout(spans_of(trees), [None], query.shape[2], CPU)
    register_attention()
    output, weights = tree_attention(nn.Module(), query, key, value, None, 0.2, dropout=0.9, layout=layout)
    wanted = dense_attention(query, key, value, dense_mask(trees, None), 0.2)
    torch.testing.assert_close(output, wanted.transpose(1, 2))
    assert weights is None


@pytest.mark.parametrize("wish", ["softcap", "s_aux", "position_bias"])
def test_what_it_cannot_do_is_refused(wish: str) -> None:
    query, key, value = random_qkv(2, 1, 1)
    with pytest.raises(UserError, match=f"Module wants {wish}"):
        tree_attention(nn.Module(), query, key, value, None, layout=Layout((), {}), **{wish: 30.0})


def test_without_a_layout_it_is_refused() -> None:
    """A model whose forward drops the keyword would have each completion see all others."""
    with pytest.raises(UserError, match="Module is not handed on"):
        tree_attention(nn.Module(), *random_qkv(2, 1, 1), None)
