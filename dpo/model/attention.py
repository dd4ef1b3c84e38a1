"""Shared-prefix attention over packed trees: every completion sees its own prompt and itself, nothing else.

A micro-batch is one packed row of L tokens: tree after tree, and in a tree the prompt, then its completions. Positions
of a completion continue where the prompt ended. On a CPU the row is worked off segment by segment with torch's fused
attention; on CUDA the same layout is one FlexAttention call with a block mask.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from dpo.base.errors import UserError
from dpo.batch.block_mask import BLOCK, Window
from dpo.batch.layout import Layout, segments
from dpo.model.flex_options import flex_options

ATTENTION = "dpo_tree"
"""The name under which transformers finds this attention; it is part of the reference cache's key."""


# --- on a CPU: segment by segment ------------------------------------------------------------------------------------


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: Window, scale: float | None
) -> Tensor:
    """Attention of the packed row, (1, heads, L, D) from queries of that shape and keys and values (1, kv_heads, L,
    D).
    """
    lengths = [num_queries for span in layout.spans for num_queries, *_ in segments(span)]
    # Split once: the gradient of a slice is as long as the whole row, so that of all slices would be quadratic. Tokens
    # before heads, as the projections around it have them in memory.
    pieces = zip(*(tensor.transpose(1, 2).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
    outputs = []
    for span, masks in zip(layout.spans, layout.masks[window], strict=True):
        outputs += _tree_attention([next(pieces) for _ in masks], span.prompt_len, masks, scale)
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _tree_attention(
    pieces: Sequence[tuple[Tensor, ...]], prompt_len: int, masks: Sequence[Tensor | None], scale: float | None
) -> list[Tensor]:
    """Each segment's output, (1, queries, heads, D), from its own (query, key, value), tokens before heads."""
    prompt_key, prompt_value = (tensor[:, :prompt_len] for tensor in pieces[0][1:])
    outputs = []
    for number, ((query, key, value), mask) in enumerate(zip(pieces, masks, strict=True)):
        if number > 0:
            key, value = torch.cat([prompt_key, key], dim=1), torch.cat([prompt_value, value], dim=1)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        mask = None if mask is None else mask.to(query.dtype)
        grouped = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        outputs.append(output.transpose(1, 2))
    return outputs


@torch.compiler.disable  # type: ignore[untyped-decorator]  # not annotated
def _segment_attention_uncompiled(*args: Any) -> Tensor:
    """Segment lengths change with every micro-batch: compiling the loop would compile it again and again."""
    return segment_attention(*args)


# --- on CUDA: one FlexAttention call ---------------------------------------------------------------------------------

SMALLEST_WIDTH = 16
"""FlexAttention's kernels on CUDA do not run narrower heads."""


def block_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """FlexAttention of the packed row: shapes as in `segment_attention`. Narrow heads are widened by zeros, which
    change no score and add columns of zeros to the output.
    """
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if width < SMALLEST_WIDTH:
        query, key, value = (F.pad(x, (0, SMALLEST_WIDTH - width)) for x in (query, key, value))
    # A compiled layer takes the plain function into its own graph.
    attend: Any = _flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    grouped = query.shape[1] != key.shape[1]
    options = _kernel_options(query)
    output: Tensor = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options)
    return output[..., :width]


def _kernel_options(query: Tensor) -> dict[str, Any] | None:
    """Returns the kernel options for these queries on CUDA, else None. torch.compile evaluates this while it traces."""
    if not query.is_cuda:
        return None
    properties = torch.cuda.get_device_properties(query.device)
    return flex_options(query.shape[-1], query.dtype.itemsize, (properties.major, properties.minor))


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, **options: Any) -> Any:
    """FlexAttention that knows its rows to be whole blocks, also in a graph where their length is an unknown: its
    kernels then look for no border. That all lengths are one comes first, so that one unknown is left to speak of.
    """
    num_tokens = query.shape[2]
    for other in (key.shape[2], value.shape[2], *block_mask.seq_lengths):
        torch._check(other == num_tokens)
    torch._check(query.shape[2] % BLOCK == 0)
    return flex_attention(query, key, value, block_mask=block_mask, **options)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiled at first use: that takes every rank seconds. The wrapping lets selective checkpointing see the call (as
    `inductor_compiled_code`) and keep its result.
    """
    return torch.compile(_flex_attention, options={"wrap_inductor_compiled_regions": True})


# --- what transformers calls -----------------------------------------------------------------------------------------


def tree_attention(  # noqa: PLR0913  (the signature that transformers calls)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: output (1, L, heads, D). `dropout` is ignored: a run has none.

    Raises UserError where the model asks for something that this attention does not do.
    """
    wishes = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if wishes:
        what = f"{type(module).__name__} wants {', '.join(wishes)}, which shared-prefix attention does not do"
        raise UserError("model.path", f"not supported: {what}")
    if layout is None:
        what = f"{type(module).__name__} is not handed on what its model's forward is given: the places of the trees"
        raise UserError("model.path", f"not supported: {what}")
    mask = layout.masks[sliding_window]
    if isinstance(mask, BlockMask):
        output = block_attention(query, key, value, mask, scaling)
    else:
        output = _segment_attention_uncompiled(query, key, value, layout, sliding_window, scaling)
    return output.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Makes `attn_implementation="dpo_tree"` known to transformers; calling it again changes nothing.

    No mask goes with it. transformers then makes none, and does not look at the positions for the borders of sequences,
    for which the host would wait in every forward pass.
    """
    AttentionInterface.register(ATTENTION, tree_attention)
