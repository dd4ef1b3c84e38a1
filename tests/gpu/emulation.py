"""What CUDA runs, on a CPU: padded rows, block masks, and FlexAttention forward and backward in its dense form.

So the tests of this folder are run where there is no GPU, all but what kernels, streams and the allocator do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from dpo.attention import Layout, _flex_attention, make_layout
from dpo.block_mask import Span, Window, host_mask
from dpo.packing import PackedBatch, pack, padded_length


@contextmanager
def emulated() -> Iterator[None]:
    """What is packed and run inside goes the way of CUDA; dynamo and autograd compile it, inductor does not."""
    flex, compile_module = torch.compile(_flex_attention, backend="aot_eager"), nn.Module.compile
    changes: list[tuple[str, Any]] = [
        ("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None),  # refuses gradients on a CPU
        ("dpo.attention._compiled_flex_attention", lambda: flex),
        ("dpo.packing.make_layout", _block_layout),
        ("dpo.batches.pack", _pack_padded),
        ("torch.nn.Module.compile", _compile_with(compile_module)),
    ]
    with ExitStack() as stack:
        for name, value in changes:
            stack.enter_context(patch(name, value))
        yield


def _compile_with(compile_module: Callable[..., None]) -> Callable[..., None]:
    """Compiles a module as asked, but for inductor and its options."""
    return lambda module, options: compile_module(module, backend="aot_eager")


def _block_layout(spans: Sequence[Span], windows: Sequence[Window], num_tokens: int, device: torch.device) -> Layout:
    spans = make_layout(spans, (), num_tokens, device).spans
    return Layout(spans, {window: host_mask(spans, window, pin=False) for window in windows})


def _pack_padded(*args: Any) -> PackedBatch:
    return pack(*args[:-1], padded_length if args[-1] is int else args[-1])
