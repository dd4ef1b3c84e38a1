"""What CUDA runs, on a CPU: padded rows, block masks, and FlexAttention forward and backward in its dense form.

So the tests of this folder are run where there is no GPU, all but what kernels, streams and the allocator do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from dpo.batch.block_mask import BLOCK, Span, Window, host_mask
from dpo.batch.layout import Layout, make_layout
from dpo.batch.packing import PackedBatch, pack, padded_length
from dpo.model.attention import _flex_attention
from tests.support.float32_product import float32_products


@contextmanager
def emulated() -> Iterator[None]:
    """What is packed and run inside goes the way of CUDA; dynamo and autograd compile it, inductor does not."""
    flex, compile_module = torch.compile(_flex_attention, backend="aot_eager"), nn.Module.compile
    changes: list[tuple[str, Any]] = [
        ("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None),  # refuses gradients on a CPU
        ("dpo.model.attention._compiled_flex_attention", lambda: flex),
        ("dpo.batch.packing.make_layout", _block_layout),
        ("dpo.batch.packer.pack", _pack_padded),
        ("torch.nn.Module.compile", _compile_with(compile_module)),
    ]
    with ExitStack() as stack:
        for name, value in changes:
            stack.enter_context(patch(name, value))
        stack.enter_context(float32_products())
        yield


@contextmanager
def emulated_kernel() -> Iterator[None]:
    """`emulated`, with attention in the arithmetic of FlexAttention's kernel, which is not compiled."""
    with emulated(), patch("dpo.model.attention._compiled_flex_attention", lambda: kernel):
        yield


KERNEL_KEYS = 64
"""Keys that the kernel takes at a time (BLOCK_N for heads of up to 128, torch/_inductor/kernel/flex_attention)."""


def kernel(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float, **options: Any) -> Tensor:
    """(1, heads, L, D): FlexAttention's forward, but for the order of its sums inside a block of keys. Where a tree
    lies in the row decides where its blocks end, and so how its probabilities are rounded. `options` change no value.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    place = torch.arange(query.shape[2])
    seen = block_mask.mask_mod(None, None, place[:, None], place[None])
    outputs = [
        _attend(
            query[:, :, rows], key, value, [(keys, seen[rows, keys]) for keys in _key_blocks(block_mask, row)], scale
        )
        for row, rows in enumerate(slice(first, first + BLOCK) for first in range(0, len(place), BLOCK))
    ]
    return torch.cat(outputs, 2)


def _key_blocks(mask: BlockMask, row: int) -> Iterator[slice]:
    """The blocks of keys of one block of queries: first those seen in part, then those seen whole."""
    for counts, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        for block in indices[0, 0, row, : int(counts[0, 0, row])].tolist():
            for first in range(BLOCK * block, BLOCK * (block + 1), KERNEL_KEYS):
                yield slice(first, first + KERNEL_KEYS)


def _attend(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[tuple[slice, Tensor]], scale: float) -> Tensor:
    """One block of queries over its blocks of keys: a running maximum, sums in float32, and probabilities that are
    rounded to the dtype of the values before they are multiplied.
    """
    top, total, summed = torch.full(query.shape[:3], -torch.inf), torch.zeros(query.shape[:3]), torch.zeros(query.shape)
    for keys, seen in blocks:
        scores = (query.float() @ key[:, :, keys].float().transpose(2, 3)) * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        higher = torch.maximum(top, scores.amax(-1))
        safe = torch.where(higher == -torch.inf, 0.0, higher)
        probabilities = torch.exp(scores - safe[..., None])
        shrink = torch.where(top == -torch.inf, 0.0, torch.exp(top - safe))
        total = total * shrink + probabilities.sum(-1)
        product = probabilities.to(value.dtype).float() @ value[:, :, keys].float()
        summed, top = summed * shrink[..., None] + product, higher
    return (summed / total[..., None]).to(query.dtype)


def _compile_with(compile_module: Callable[..., None]) -> Callable[..., None]:
    """Compiles a module as asked, but for inductor and its options."""
    return lambda module, options: compile_module(module, backend="aot_eager")


def _block_layout(spans: Sequence[Span], windows: Sequence[Window], num_tokens: int, device: torch.device) -> Layout:
    spans = make_layout(spans, (), num_tokens, device).spans
    return Layout(spans, {window: host_mask(spans, window, pin=False) for window in windows})


def _pack_padded(*args: Any) -> PackedBatch:
    *others, row_format = args
    is_plain = row_format.row_length is int
    return pack(*others, replace(row_format, row_length=padded_length) if is_plain else row_format)
