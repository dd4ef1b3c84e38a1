"""Where prompts and completions stand in a packed row, as attention needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dpo.batch.block_mask import HostMask, Span, Window, host_mask


@dataclass(frozen=True)
class Layout:
    """What attention must know of a packed row: its trees, and the masks of each window, made once a micro-batch.

    Meant for CUDA, `masks[window]` is a HostMask, and once there a BlockMask. On a CPU it holds, for each tree, the
    mask of each segment (see `segments`), None where plain causal attention is right.
    """

    spans: tuple[Span, ...]
    masks: Mapping[Window, Any]

    def to(self, device: torch.device) -> "Layout":
        """The layout with its masks on a device; the host does not wait for the copies."""
        moved = {w: mask.to(device) if isinstance(mask, HostMask) else mask for w, mask in self.masks.items()}
        return replace(self, masks=moved)


def make_layout(spans: Sequence[Span], windows: Sequence[Window], num_tokens: int, device: torch.device) -> Layout:
    """The layout of a row of `num_tokens` tokens that is meant for `device`, made on the host.

    The tokens behind the last tree are padding: a tree of their own, so that no row of the softmax is empty.
    """
    used = sum(span.num_tokens for span in spans)
    spans = (*spans, *([Span(used, num_tokens - used, ())] if num_tokens > used else []))
    if device.type == "cuda":
        masks: dict[Window, Any] = {w: host_mask(spans, w, pin=True) for w in windows}
    else:
        masks = {w: [[segment_mask(*segment, w) for segment in segments(span)] for span in spans] for w in windows}
    return Layout(spans, masks)


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


def attention_windows(config: PretrainedConfig) -> tuple[Window, ...]:
    """The distinct attention windows of a model's layers: None is full attention."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return tuple({window if kind == "sliding_attention" else None for kind in kinds})
