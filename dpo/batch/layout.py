"""Where the prompts and completions of a packed row begin and end, in the forms that attention takes.

On CUDA attention is one FlexAttention call with a mask for the whole row (`block_mask`). On a CPU it is one call per
segment. The row of `packing` has two trees: a prompt of 3 tokens with completions of 2 and 3, and a prompt of 2 tokens
with a completion of 3. It has three segments:

    queries                          keys                                  mask
    places 0 to 4: prompt and a      places 0 to 4                         causal
    places 5 to 7: b                 places 0 to 2 (prompt) and 5 to 7     (3, 6): the prompt whole, b causal
    places 8 to 12: prompt and c     places 8 to 12                        causal
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dpo.batch.block_mask import HostMask, Span, Window, host_mask


@dataclass(frozen=True)
class Layout:
    """The trees of a packed row and their attention masks per window, made once per micro-batch.

    For CUDA, `masks[window]` is a HostMask, and a BlockMask after `to`. For a CPU it is a list per tree of the mask of
    each segment (see `segments`): None where plain causal attention is right.
    """

    spans: tuple[Span, ...]
    masks: Mapping[Window, Any]

    def to(self, device: torch.device) -> "Layout":
        """Returns the layout with its masks on a device; the host does not wait for the copies."""
        moved = {w: mask.to(device) if isinstance(mask, HostMask) else mask for w, mask in self.masks.items()}
        return replace(self, masks=moved)


def make_layout(spans: Sequence[Span], windows: Sequence[Window], num_tokens: int, device: torch.device) -> Layout:
    """Returns the layout of a row of `num_tokens` tokens for `device`, made on the host.

    The tokens after the last tree are padding. They form a tree of their own, so that no row of the softmax is empty.

    Args:
        spans: the places of the trees, one after another from place 0.
        windows: the distinct attention windows of the model, in keys; each gets a mask.
        num_tokens: L, the length of the row with its padding; on CUDA a multiple of `BLOCK`.
        device: the device on which attention will run; its type decides the form of the masks.
    """
    used = sum(span.num_tokens for span in spans)
    spans = (*spans, *([Span(used, num_tokens - used, ())] if num_tokens > used else []))
    if device.type == "cuda":
        masks: dict[Window, Any] = {w: host_mask(spans, w, pin=True) for w in windows}
    else:
        masks = {w: [[segment_mask(*segment, w) for segment in segments(span)] for span in spans] for w in windows}
    return Layout(spans, masks)


def segments(span: Span) -> list[tuple[int, int, bool]]:
    """Returns the attention calls of a tree as (queries, keys, whether query i sees the keys up to i).

    The prompt and the first completion are one causal call. Each further completion attends to the keys of the prompt
    and, causally, to its own, which are the last of the keys.
    """
    first = span.prompt_len + (span.completion_lens[0] if span.completion_lens else 0)
    return [(first, first, True)] + [(n, span.prompt_len + n, False) for n in span.completion_lens[1:]]


def segment_mask(num_queries: int, num_keys: int, causal: bool, window: Window) -> Tensor | None:
    """Returns the mask of a segment, which is added to its scores: 0 or -inf. The last query sees the last key.

    Args:
        num_queries: queries of the segment, in tokens.
        num_keys: keys of the segment, in tokens, at least `num_queries`.
        causal: True where query i sees the keys up to i; False where the keys before the last `num_queries`, those of
            the prompt, are seen by all queries.
        window: the maximum number of keys that a query sees, itself included; None is no limit.

    Returns:
        (num_queries, num_keys) float32 on the CPU, or None where plain causal attention is right.
    """
    if causal and (window is None or num_keys <= window):
        return None
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    seen = (distance >= 0) & (distance < (window or num_keys))
    return torch.zeros(num_queries, num_keys).masked_fill_(~seen, float("-inf"))


def attention_windows(config: PretrainedConfig) -> tuple[Window, ...]:
    """Returns the distinct attention windows of a model's layers; None is full attention."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return tuple({window if kind == "sliding_attention" else None for kind in kinds})
