"""Shared-prefix attention against a dense masked softmax; FlexAttention against the loop."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dpo.base.errors import UserError
from dpo.batch.block_mask import Span, Window, host_mask
from dpo.batch.layout import Layout, make_layout
from dpo.model.attention import _flex_attention, block_attention, register_attention, segment_attention, tree_attention
from tests.support.trees import TREES, dense_mask, spans_of, tokens_of

CPU = torch.device("cpu")
WIDTH = 8


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, -inf where masked) v, head by head; each kv head serves several heads of queries."""
    groups = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = scale * query[0, head] @ key[0, head // groups].T
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        heads.append(weights @ value[0, head // groups])
    return torch.stack(heads)[None]


def random_qkv(
    length: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64, width: int = WIDTH
) -> list[Tensor]:
    random = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, width), (1, kv_heads, length, width), (1, kv_heads, length, width)]
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


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("kv_heads", "width"), [(4, 16), (2, 16), (2, 8)])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("scale", [0.2, None])
def test_flex_attention_is_the_segment_loop(
    monkeypatch: pytest.MonkeyPatch, window: Window, kv_heads: int, width: int, scale: float | None
) -> None:
    """Forward on a CPU with the block mask, uncompiled: two blocks of 128 tokens, a tree across their border, and
    padding. Heads of 8 are widened to the 16 that the kernels on CUDA need.
    """
    monkeypatch.setattr("dpo.model.attention._compiled_flex_attention", lambda: flex_attention)
    spans = spans_of([(60, (40, 70, 3)), (9, (4, 4, 6))])
    query, key, value = (x.detach() for x in random_qkv(256, 4, kv_heads, torch.float32, width))
    layout = make_layout(spans, [window], 256, CPU)
    mask = host_mask(layout.spans, window, pin=False).to(CPU)
    found = block_attention(query, key, value, mask, scale)
    wanted = segment_attention(query, key, value, layout, window, scale)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_padding_is_a_tree_of_its_own() -> None:
    """Four tokens behind the last tree: the loop runs them, and what stands before them is what it is without them."""
    trees = TREES["several trees"]
    length = len(tokens_of(trees))
    query, key, value = (x.detach() for x in random_qkv(length + 4, 4, 2))
    layout = make_layout(spans_of(trees), [3], length + 4, CPU)
    assert layout.spans[-1] == Span(length, 4, ())
    padded = segment_attention(query, key, value, layout, 3, 0.2)
    bare = make_layout(spans_of(trees), [3], length, CPU)
    row = (query[:, :, :length], key[:, :, :length], value[:, :, :length])
    torch.testing.assert_close(padded[:, :, :length], segment_attention(*row, bare, 3, 0.2))
    alone = make_layout([Span(0, 4, ())], [3], 4, CPU)
    row = (query[:, :, length:], key[:, :, length:], value[:, :, length:])
    torch.testing.assert_close(padded[:, :, length:], segment_attention(*row, alone, 3, 0.2))


def test_one_graph_serves_every_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve micro-batches of other trees, with and without a window, of one padded length, then of three others:
    the first length is one graph, the second makes the length an unknown, and no other is ever needed. The kernels
    are told that it is a multiple of 128, and one length for queries and keys.
    """
    torch.compiler.reset()
    graphs: list[tuple[bool, bool]] = []  # what guards them is the same as on CUDA

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        tensors = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        lengths = [x.shape[2] for x in tensors if isinstance(x, Tensor) and x.ndim == 4 and x.shape[-1] == 16]
        assert len(lengths) == 3  # of query, key and value
        known = [length % 128 == 0 for length in lengths] + [length == lengths[0] for length in lengths]
        graphs.append((isinstance(lengths[0], int), all(map(statically_known_true, known))))
        return graph.forward

    monkeypatch.setattr("dpo.model.attention._compiled_flex_attention", lambda: compiled)
    compiled = torch.compile(_flex_attention, backend=backend)
    random = np.random.default_rng(0)

    def attend(length: int, window: Window) -> None:
        lens = [int(n) for n in random.integers(1, length // 8, 6)]
        layout = make_layout([Span(0, lens[0], tuple(lens[1:]))], [window], length, CPU)
        query, key, value = (torch.ones(1, heads, length, 16) for heads in (4, 2, 2))
        block_attention(query, key, value, host_mask(layout.spans, window, pin=False).to(CPU), 0.2)

    for number in range(12):
        attend(512, (None, 40, 100)[number % 3])
    assert graphs == [(True, True)]
    for length in (640, 768, 1024, 512):
        attend(length, None)
        attend(length, 40)
    assert graphs == [(True, True), (False, True)]
    torch.compiler.reset()


def test_masks_made_for_cuda_are_moved_at_once() -> None:
    """A layout holds host tensors until it is moved; what a CPU needs is never touched."""
    spans = spans_of(TREES["several trees"])
    on_host = Layout(tuple(spans), {None: host_mask(spans, None, pin=False)})
    assert isinstance(on_host.to(CPU).masks[None], BlockMask)
    segments = make_layout(spans, [4], 45, CPU)
    assert segments.to(CPU).masks == segments.masks


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
