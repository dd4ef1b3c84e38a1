"""Stands in for FlexAttention in a rehearsal: keeps the same tensors. FlexAttention has no backward pass on a CPU.

Between its forward and its backward pass FlexAttention keeps queries, keys, values (not repeated for grouped queries),
its output, and the logarithm of each query's sum in float32; the output has the memory layout of the queries. Compiled
alone, FlexAttention returns queries, keys and values as results of its region, for its backward pass. Selective
checkpointing keeps the results of that region, hence these three too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dpo.model.attention import ATTENTION, SMALLEST_WIDTH, register_attention


@torch.library.custom_op("dpo_estimate::flex_attention", mutates_args=())
def kept_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for FlexAttention's forward pass. Selective checkpointing keeps the results of operations with this
    name.

    Args:
        query: (1, heads, L, D).
        key, value: (1, kv_heads, L, D).

    Returns:
        The output, (1, heads, L, D), and the logsumexp, (1, heads, L) float32, without values.
    """
    outputs: tuple[Tensor, Tensor] = _outputs(query, key, value)
    return outputs


@kept_attention.register_fake
def _outputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dpo_estimate::flex_attention_backward", mutates_args=())
def kept_attention_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Stands in for FlexAttention's backward pass.

    Args:
        query: (1, heads, L, D).
        key, value: (1, kv_heads, L, D).
        out: (1, heads, L, D).
        logsumexp: (1, heads, L) float32.
        grad: (1, heads, L, D), the gradient of `out`.

    Returns:
        The gradients of queries, keys and values, without values.
    """
    gradients: tuple[Tensor, Tensor, Tensor] = _gradients(query, key, value, out, logsumexp, grad)
    return gradients


@kept_attention_backward.register_fake
def _gradients(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_LIBRARY = torch.library.Library("dpo_estimate", "FRAGMENT")
_LIBRARY.define("flex_attention_inputs(Tensor(a) q, Tensor(b) k, Tensor(c) v) -> (Tensor(a), Tensor(b), Tensor(c))")
_LIBRARY.impl("flex_attention_inputs", lambda query, key, value: (query, key, value), "CompositeExplicitAutograd")
returned_inputs = torch.ops.dpo_estimate.flex_attention_inputs
"""Returns its inputs themselves. Selective checkpointing keeps the results of operations with this name."""


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = kept_attention_backward(*ctx.saved_tensors, grad)
    return gradients


kept_attention.register_autograd(_backward, setup_context=_keep)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """Stands in for `attention.tree_attention`: pads narrow heads as it does.

    Args:
        module: the attention layer; not used.
        query: (1, heads, L, D).
        key, value: (1, kv_heads, L, D).
        attention_mask: not used.
        others: not used.

    Returns:
        The output, (1, L, heads, D), without values; and None for the attention weights.
    """
    width = query.shape[-1]
    if width < SMALLEST_WIDTH:
        query, key, value = (nn.functional.pad(x, (0, SMALLEST_WIDTH - width)) for x in (query, key, value))
    if not torch.compiler.is_compiling():  # a compiled layer takes attention into its own graph
        with torch.no_grad():
            returned_inputs(*(tensor.detach() for tensor in (query, key, value)))
    output, _ = kept_attention(query, key, value)
    return output[..., :width].transpose(1, 2).contiguous(), None


@contextmanager
def flex_attention_stood_in_for() -> Iterator[None]:
    """Makes models that `dpo.model.build.build_policy` has built attend with `attend` inside."""
    AttentionInterface.register(ATTENTION, attend)
    try:
        yield
    finally:
        register_attention()
