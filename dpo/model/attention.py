"""Shared-prefix attention over packed trees: every completion attends to its own prompt and itself, nothing else.

A micro-batch is one packed row of L tokens (`batch/packing.py` has a drawing): tree after tree, in each tree the
prompt, then its completions. The positions of a completion continue those of the prompt. On a CPU the row is computed
segment by segment with torch's fused attention (`batch/layout.py` has an example). On CUDA it is one FlexAttention call
with a block mask (`batch/block_mask.py` has an example).
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
"""The name under which transformers finds this attention; it is part of the key of cached reference rows."""


# --- on a CPU: segment by segment ------------------------------------------------------------------------------------


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: Window, scale: float | None
) -> Tensor:
    """Computes attention over the packed row, segment by segment.

    Args:
        query: (1, heads, L, D).
        key: (1, kv_heads, L, D).
        value: (1, kv_heads, L, D).
        layout: the trees of the row, with the masks of `window`.
        window: the attention window of the layer.
        scale: the factor of the scores; None is D ** -0.5.

    Returns:
        (1, heads, L, D).
    """
    lengths = [num_queries for span in layout.spans for num_queries, *_ in segments(span)]
    # Split once: the gradient of each slice would be as long as the whole row, which is quadratic for all slices.
    # Tokens come before heads because the projections have them in memory in this order.
    pieces = zip(*(tensor.transpose(1, 2).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
    outputs = []
    for span, masks in zip(layout.spans, layout.masks[window], strict=True):
        outputs += _tree_attention([next(pieces) for _ in masks], span.prompt_len, masks, scale)
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _tree_attention(
    pieces: Sequence[tuple[Tensor, ...]], prompt_len: int, masks: Sequence[Tensor | None], scale: float | None
) -> list[Tensor]:
    """Returns the output of each segment of a tree, (1, queries, heads, D).

    Args:
        pieces: (query, key, value) of each segment, (1, queries, heads, D); the first segment begins with the prompt.
        prompt_len: tokens of the prompt, whose keys and values the further segments attend to as well.
        masks: the mask of each segment, None for plain causal attention.
        scale: the factor of the scores.
    """
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
    """Calls `segment_attention` outside of compiled graphs: segment lengths change with every micro-batch, and each
    change would compile the loop again.
    """
    return segment_attention(*args)


# --- on CUDA: one FlexAttention call ---------------------------------------------------------------------------------

SMALLEST_WIDTH = 16
"""The smallest head size that FlexAttention's kernels on CUDA run."""


def block_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """Computes attention over the packed row with FlexAttention.

    Narrow heads are padded with zeros, which change no score and add columns of zeros to the output.

    Args:
        query: (1, heads, L, D), L a multiple of `BLOCK`.
        key: (1, kv_heads, L, D).
        value: (1, kv_heads, L, D).
        mask: the mask of the row, on the same device.
        scale: the factor of the scores; None is D ** -0.5.

    Returns:
        (1, heads, L, D), in the dtype of `query`.
    """
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if width < SMALLEST_WIDTH:
        query, key, value = (F.pad(x, (0, SMALLEST_WIDTH - width)) for x in (query, key, value))
    # A compiled layer traces the plain function into its own graph.
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
    """Calls FlexAttention after it asserts that the row is whole blocks, so that kernels for symbolic lengths need no
    bounds checks. It asserts equal lengths first, so that one symbolic size remains.
    """
    num_tokens = query.shape[2]
    for other in (key.shape[2], value.shape[2], *block_mask.seq_lengths):
        torch._check(other == num_tokens)
    torch._check(query.shape[2] % BLOCK == 0)
    return flex_attention(query, key, value, block_mask=block_mask, **options)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Returns the compiled `_flex_attention`. Its first call compiles, which takes seconds on every rank.

    The compiled region is wrapped so that selective checkpointing sees the call, as the operator
    `inductor_compiled_code`, and saves its result.
    """
    return torch.compile(_flex_attention, options={"wrap_inductor_compiled_regions": True})


# --- called by transformers ------------------------------------------------------------------------------------------


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
    """Computes attention as transformers' attention interface asks for it.

    Args:
        module: the attention layer of the model, which errors name.
        query: (1, heads, L, D).
        key, value: (1, kv_heads, L, D).
        attention_mask: ignored: transformers makes none for this attention.
        scaling: the factor of the scores; None is D ** -0.5.
        dropout: ignored, since a run has no dropout.
        sliding_window: the attention window of the layer, in keys; None is no limit.
        layout: the layout of the packed row, which the model hands on from its forward's arguments.
        others: `softcap`, `s_aux` and `position_bias` are refused where they are set; other options are ignored.

    Returns:
        The output, (1, L, heads, D), contiguous; and None for the attention weights.

    Raises:
        UserError: the model asks for an option that this attention does not have, or does not hand on `layout`.
    """
    wanted = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if wanted:
        what = f"{type(module).__name__} wants {', '.join(wanted)}, which shared-prefix attention does not do"
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
    """Registers `attn_implementation="dpo_tree"` with transformers; further calls change nothing.

    It registers no mask function. transformers then makes no mask, and does not search the positions for the borders of
    sequences, for which the host would wait for the device in every forward pass.
    """
    AttentionInterface.register(ATTENTION, tree_attention)
