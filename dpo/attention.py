"""Shared-prefix attention over packed trees: every completion sees its own prompt and itself, nothing else.

A micro-batch is one packed row of L tokens: tree after tree, and in a tree the prompt, then its completions. Positions
of a completion continue where the prompt ended. On a CPU the row is worked off segment by segment with torch's fused
attention; on CUDA the same layout is one FlexAttention call with a block mask.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from dpo.errors import UserError

ATTENTION = "dpo_tree"
"""The name under which transformers finds this attention; it is part of the reference cache's key."""

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
class Layout:
    """What attention must know of a packed row: its trees, and the masks of each window, made once a micro-batch.

    `masks[window]` is a BlockMask on CUDA. On a CPU it holds, for each tree, the mask of each segment (see
    `segments`), None where plain causal attention is right.
    """

    spans: tuple[Span, ...]
    masks: Mapping[Window, Any]

    def to(self, device: torch.device) -> "Layout":
        """The layout with its masks on a device."""
        return self


def make_layout(spans: Sequence[Span], windows: Sequence[Window], num_tokens: int, device: torch.device) -> Layout:
    """The layout of a row of `num_tokens` tokens (those behind the last tree are padding) with its masks on
    `device`.
    """
    spans = tuple(spans)
    if device.type == "cuda":
        masks: dict[Window, Any] = {w: block_mask(spans, w, num_tokens, device) for w in windows}
    else:
        masks = {w: [[segment_mask(*segment, w) for segment in segments(span)] for span in spans] for w in windows}
    return Layout(spans, masks)


# --- on a CPU: segment by segment ------------------------------------------------------------------------------------


def segments(span: Span) -> list[tuple[int, int, bool]]:
    """The attention calls of a tree as (queries, keys, whether they are causal from the first key on).

    The prompt and the first completion are one causal run; each further completion looks at the prompt's keys and its
    own, the queries standing at the end.
    """
    first = span.prompt_len + (span.completion_lens[0] if span.completion_lens else 0)
    return [(first, first, True)] + [(n, span.prompt_len + n, False) for n in span.completion_lens[1:]]


def segment_mask(num_queries: int, num_keys: int, causal: bool, window: Window) -> Tensor | None:
    """A float mask (num_queries, num_keys), 0 or -inf, the last query at the last key; None for plain causal
    attention.
    """
    if causal and (window is None or num_keys <= window):
        return None
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    seen = (distance >= 0) & (distance < (window or num_keys))
    return torch.zeros(num_queries, num_keys).masked_fill_(~seen, float("-inf"))


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: Window, scale: float | None
) -> Tensor:
    """Attention of the packed row, (1, heads, L, D) from queries of that shape and keys and values (1, kv_heads, L,
    D).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    for span, masks in zip(layout.spans, layout.masks[window], strict=True):
        outputs += _tree_attention(query, key, value, span, masks, scale)
    return torch.cat(outputs, dim=2)


def _tree_attention(
    query: Tensor, key: Tensor, value: Tensor, span: Span, masks: Sequence[Tensor | None], scale: float | None
) -> list[Tensor]:
    outputs, place = [], span.start
    prompt = slice(span.start, span.start + span.prompt_len)
    for (num_queries, _, causal), mask in zip(segments(span), masks, strict=True):
        own = slice(place, place + num_queries)
        k, v = key[:, :, own], value[:, :, own]
        if not causal:
            k, v = torch.cat([key[:, :, prompt], k], dim=2), torch.cat([value[:, :, prompt], v], dim=2)
        mask = None if mask is None else mask.to(query.dtype)
        outputs.append(
            F.scaled_dot_product_attention(query[:, :, own], k, v, mask, is_causal=mask is None, scale=scale)
        )
        place += num_queries
    return outputs


# --- on CUDA: one FlexAttention call ---------------------------------------------------------------------------------


def tree_mask_mod(
    spans: Sequence[Span], window: Window, num_tokens: int, device: torch.device
) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod of a packed row: same tree, the key in the prompt or in the query's own completion,
    before it.

    Padding makes a tree of its own, so that no row of the softmax is empty.
    """
    trees = torch.full((num_tokens,), -1)
    owners = torch.zeros(num_tokens, dtype=torch.long)
    positions = torch.arange(num_tokens)
    for number, span in enumerate(spans):
        place = span.start + span.prompt_len
        trees[span.start : span.start + span.num_tokens] = number
        positions[span.start : place] = torch.arange(span.prompt_len)
        for owner, length in enumerate(span.completion_lens, start=1):
            owners[place : place + length] = owner
            positions[place : place + length] = torch.arange(span.prompt_len, span.prompt_len + length)
            place += length
    trees, owners, positions = (t.to(device, non_blocking=True) for t in (trees, owners, positions))

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        family = (trees[q] == trees[k]) & ((owners[k] == 0) | (owners[k] == owners[q]))
        return family & (positions[q] >= positions[k])

    def windowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask_mod(batch, head, q, k) & (positions[q] - positions[k] < int(window or 0))

    # The mask of full attention must not see a number that changes with the row: it would be compiled as an unknown.
    return mask_mod if window is None else windowed


def block_mask(spans: Sequence[Span], window: Window, num_tokens: int, device: torch.device) -> BlockMask:
    """The block-sparse mask of a packed row for FlexAttention."""
    mask_mod = tree_mask_mod(spans, window, num_tokens, device)
    return create_block_mask(mask_mod, None, None, num_tokens, num_tokens, device=str(device))


@torch.compiler.disable
def _segment_attention_uncompiled(*args: Any) -> Tensor:
    """Segment lengths change with every micro-batch: compiling the loop would compile it again and again."""
    return segment_attention(*args)


_compiled_flex_attention = torch.compile(flex_attention)
"""With lengths as unknowns from the second one on: every micro-batch has another."""


# --- what transformers calls -----------------------------------------------------------------------------------------


def tree_attention(
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
        raise UserError(f"model.path: not supported: {what}")
    if layout is None:
        what = f"{type(module).__name__} is not handed on what its model's forward is given: the places of the trees"
        raise UserError(f"model.path: not supported: {what}")
    if query.device.type == "cuda":
        grouped = query.shape[1] != key.shape[1]
        mask = layout.masks[sliding_window]
        output = _compiled_flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    else:
        output = _segment_attention_uncompiled(query, key, value, layout, sliding_window, scaling)
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout is the mask: transformers must not make one of (L, L)."""


def register_attention() -> None:
    """Makes `attn_implementation="dpo_tree"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION, tree_attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
