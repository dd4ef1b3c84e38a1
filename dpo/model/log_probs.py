"""Hidden states to log-probabilities of completions, without a tensor of (rows x vocabulary).

The head is run a chunk of rows at a time, as many as a budget of bytes allows; the backward pass computes the logits
of a chunk again instead of keeping them, but for the last chunk, which is still there: where one chunk holds all rows,
nothing is computed twice. R rows predict R completion tokens of B completions; H is the hidden size, V the vocabulary.

Logits are never rounded to less than float32 on CUDA: the product of narrower factors (bfloat16) is written as float32.
A CPU has no such product. There the logits are computed in the dtype of the head's weights, then widened.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

NARROW_BLOCKS = 16
"""A chunk's gradient is converted to bfloat16 in blocks; the first is 1/16 of the chunk and the only one that needs
memory of its own."""


class Head(NamedTuple):
    """The linear layer from hidden states to logits, and how it is run."""

    weight: Tensor
    """(V, H)."""
    bias: Tensor | None
    """(V,)."""
    max_bytes: int
    """The most bytes that everything as wide as the vocabulary takes at once, in either pass; at least one row."""
    device_type: str | None = None
    """Where it is computed; None: where the weight lies. `dpo.estimate` runs what CUDA runs on tensors without
    memory."""


class Chunking(NamedTuple):
    """How rows are run through the head."""

    is_wide: bool
    """See `has_float32_product`."""
    num_rows: int
    """Rows whose logits are in memory at a time."""


def completion_log_probs(hidden: Tensor, head: Head, targets: Tensor, lengths: Tensor) -> Tensor:
    """Returns the log-probability of each completion given its prompt, summed over its tokens: (B,) nats.

    Args:
        hidden: (R, H), the rows of a completion one after another.
        targets: (R,) token ids.
        lengths: (B,) rows of each completion; one without rows gets 0.

    Returns:
        (B,) float32, float64 where the weights are.
    """
    weight, bias = head.weight, head.bias
    device_type = head.device_type or weight.device.type
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    chunk = rows_in_chunk(weight.shape[0], weight.dtype, head.max_bytes, device_type, needs_gradient)
    chunking = Chunking(has_float32_product(device_type, weight.dtype), chunk)
    # torch gives `apply` no annotations.
    token_logps: Tensor = ChunkedTokenLogProbs.apply(hidden, weight, bias, targets, chunking)  # type: ignore[no-untyped-call]
    # In float64, and not by index_add, whose order of addition on CUDA changes from run to run.
    sums = torch.segment_reduce(token_logps.double(), "sum", lengths=lengths, unsafe=True)
    return sums.to(token_logps.dtype)


def has_float32_product(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a head with weights of `dtype` gets its logits as float32 from the product itself.

    So it is on CUDA (`torch.mm` with `out_dtype`, https://docs.pytorch.org/docs/stable/generated/torch.mm.html) where
    the weights are narrower than float32. The cache of reference rows has it in its key.
    """
    return device_type == "cuda" and dtype.itemsize < torch.float32.itemsize


def rows_in_chunk(
    vocab_size: int, dtype: torch.dtype, head_bytes: int, device_type: str, needs_gradient: bool = True
) -> int:
    """Rows whose logits fit into `head_bytes`; `dtype` is that in which the head computes.

    Bytes of a logit: 4 in float32, 8 in float64. In bfloat16 4 + 2 on a CPU, for a narrow copy of all logits; on CUDA
    4, and with gradients 1/16 of 2 more, for the first of the blocks in which `_narrow_in_place` goes.
    """
    wide = _logits_dtype(dtype)
    bytes_each: float = wide.itemsize
    if has_float32_product(device_type, dtype):
        bytes_each += dtype.itemsize / NARROW_BLOCKS if needs_gradient else 0
    elif dtype != wide:
        bytes_each += dtype.itemsize
    return max(1, int(head_bytes // (vocab_size * bytes_each)))


def recomputed_share(num_rows: int, vocab_size: int, dtype: torch.dtype, head_bytes: int, device_type: str) -> float:
    """Part of a micro-batch's rows, from 0 to 1, whose logits the backward pass computes again: all but a chunk's."""
    return max(0.0, 1.0 - rows_in_chunk(vocab_size, dtype, head_bytes, device_type) / max(1, num_rows))


def _logits_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class ChunkedTokenLogProbs(Function):
    """log softmax(hidden weight^T + bias)[targets], (R,) nats, with the logits of a chunk of rows in memory at a time.

    For a row with logits z, target t and output gradient g:  dz = g (onehot(t) - softmax(z)).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunking: Chunking
    ) -> Tensor:
        """Returns the targets' log-probabilities (R,); keeps the inputs, and the log softmax of the last chunk."""
        ctx.chunks, ctx.is_wide = _chunks(hidden.shape[0], chunking.num_rows), chunking.is_wide
        out = torch.empty(hidden.shape[0], dtype=_logits_dtype(weight.dtype), device=hidden.device)
        buffer = _buffer(ctx.chunks, weight)
        for rows in ctx.chunks:
            logps = _log_softmax(hidden[rows], weight, bias, buffer, chunking.is_wide)
            out[rows] = logps.gather(1, targets[rows, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.last_chunk = buffer
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden (R, H), weight (V, H), bias (V,)."""
        hidden, weight, bias, targets = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        kept, ctx.last_chunk = ctx.last_chunk, None  # it is overwritten, and nobody may hold it longer than needed
        buffer = _buffer(ctx.chunks, weight) if kept is None else kept
        # Sums over chunks in the logits' precision: bfloat16 would round at every chunk.
        sum_dtype = grad.dtype if len(ctx.chunks) > 1 else weight.dtype
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.empty_like(weight, dtype=sum_dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if need_bias else None
        for rows in reversed(ctx.chunks):
            is_last = rows == ctx.chunks[-1]
            if kept is None or not is_last:
                _log_softmax(hidden[rows], weight, bias, buffer, ctx.is_wide)
            dz = buffer[: rows.stop - rows.start].exp_()  # of the negative logarithm, before it is scaled by g
            dz[torch.arange(len(dz), device=dz.device), targets[rows]] -= 1
            scale = -grad[rows, None]
            if grad_bias is not None:
                grad_bias.addmv_(dz.T, scale[:, 0])
            narrow = _narrow_in_place(dz, weight.dtype) if ctx.is_wide else dz.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.mm(narrow, weight) * scale
            if grad_weight is not None:
                _add_product(grad_weight, None if ctx.is_wide else dz, narrow, hidden[rows] * scale, keep=not is_last)
            del narrow  # the next chunk's logits take its place in the budget
        return grad_hidden, _like(grad_weight, weight), _like(grad_bias, bias), None, None


def _chunks(num_rows: int, chunk: int) -> list[slice]:
    """At least one; all of the same size but the first, so that the last, which is kept, is a whole one."""
    stops = range(num_rows, 0, -chunk) or [0]
    return [slice(max(0, stop - chunk), stop) for stop in reversed(stops)]


def _buffer(chunks: list[slice], weight: Tensor) -> Tensor:
    """Memory for the logits of any chunk: one for all, since new memory costs a CPU about as much as filling it."""
    last = chunks[-1]
    return weight.new_empty(last.stop - last.start, weight.shape[0], dtype=_logits_dtype(weight.dtype))


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, is_wide: bool) -> Tensor:
    """log softmax of the logits of some rows, (rows, V), in the first rows of the buffer."""
    out = buffer[: len(hidden)]
    if is_wide:
        _float32_product(hidden, weight.T, out, keep=False)
        if bias is not None:
            out += bias
    else:
        _put_logits(hidden, weight, bias, out)
    # In place: torch's kernels read a row's last time where they write it.
    return torch.log_softmax(out, -1, out=out)


def _put_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Computes logits in the dtype of the head's weights, then widens them, as the model's own forward does."""
    narrow = out if out.dtype == weight.dtype else None
    if bias is None:
        logits = torch.mm(hidden, weight.T, out=narrow)
    else:
        logits = torch.addmm(bias, hidden, weight.T, out=narrow)
    if narrow is None:
        out.copy_(logits)


def _float32_product(left: Tensor, right: Tensor, total: Tensor, keep: bool) -> None:
    """total = left right + (total where it is kept), a float32 sum of products of narrow factors; for CUDA alone.

    A bias is added apart: whether `addmm` takes a narrow one beside a float32 result is not documented.
    """
    torch.addmm(total, left, right, out_dtype=total.dtype, beta=int(keep), out=total)


def _narrow_in_place(dz: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts dz (rows, V), contiguous float32, to a dtype of half its width, in the first half of its own memory.

    Block [a, b) of the elements is written to the bytes of [a/2, b/2). Where b <= 2a these were read before, so no copy
    is needed. Blocks therefore double in size, and only the first, 1/16 of the whole, is copied: 4 + 2/16 bytes per
    element instead of 4 + 2, with six kernels instead of one.
    """
    wide, count = dz.view(-1), dz.numel()
    narrow = wide.view(dtype)[:count]
    stop = min(count, max(1, count // NARROW_BLOCKS))
    narrow[:stop] = wide[:stop].to(dtype)
    while stop < count:
        start, stop = stop, min(2 * stop, count)
        narrow[start:stop] = wide[start:stop]
    return narrow.view(dz.shape)


def _add_product(total: Tensor, dz: Tensor | None, narrow: Tensor, hidden: Tensor, keep: bool) -> None:
    """total (V, H) = dz^T hidden + (total where it is kept), without another tensor of this size. No `dz`: it was
    narrowed in place.
    """
    if total.dtype == narrow.dtype:
        torch.addmm(total, narrow.T, hidden.to(total.dtype), beta=int(keep), out=total)
    elif dz is None:
        _float32_product(narrow.T, hidden.to(narrow.dtype), total, keep)
    else:
        torch.addmm(total, dz.T, hidden.to(total.dtype), beta=int(keep), out=total)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)
