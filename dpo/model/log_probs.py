"""Hidden states -> log-probabilities of completions, without a tensor of shape (R, V).

R rows of hidden states predict R tokens of B completions; H is the hidden size, V the vocabulary size. The head runs a
chunk of rows at a time, as many as a budget of bytes allows. The backward pass recomputes the logits of a chunk instead
of keeping them, except for the last chunk, which is still in memory: where one chunk has all rows, nothing is computed
twice. An example: R = 10, V = 32,000, float32 and a budget of 512,000 bytes. A row of logits has 128,000 bytes, so that
a chunk has 4 rows:

    forward     rows 0 to 1, rows 2 to 5, rows 6 to 9       one buffer of 4 rows holds each chunk in turn
    backward    rows 6 to 9, in the buffer as forward left it
                rows 2 to 5, rows 0 to 1, recomputed        `recomputed_share` is 0.6

On CUDA logits are never rounded to less than float32: the product of narrower factors (bfloat16) is written as float32.
A CPU has no such product. There logits are computed in the dtype of the head's weights, then converted to float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

NARROW_BLOCKS = 16
"""The gradient of a chunk is converted to bfloat16 in blocks. Only the first block, 1/16 of the chunk, needs memory of
its own."""


class Head(NamedTuple):
    """The linear layer from hidden states to logits, and the memory that it may take."""

    weight: Tensor
    """(V, H)."""
    bias: Tensor | None
    """(V,)."""
    max_bytes: int
    """The maximum bytes of all tensors of width V at a time, in either pass; a chunk has at least one row."""
    device_type: str | None = None
    """The device type whose code path is taken; None is the device of `weight`. `dpo.estimate` takes the path of CUDA
    on tensors without memory."""


class Chunking(NamedTuple):
    """How the rows are divided into chunks and multiplied by the head."""

    is_wide: bool
    """See `has_float32_product`."""
    num_rows: int
    """The rows of a chunk."""


def completion_log_probs(hidden: Tensor, head: Head, targets: Tensor, lengths: Tensor) -> Tensor:
    """Returns the log-probability of each completion given its prompt, summed over its tokens, in nats.

    Args:
        hidden: (R, H), the rows of each completion one after another.
        head: the linear layer to logits and its budget of memory.
        targets: (R,) token ids.
        lengths: (B,) rows of each completion; a completion without rows gets 0.

    Returns:
        (B,) float32, or float64 where the weights are float64.
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
    """Returns whether the matrix product of a head with weights of `dtype` writes its logits as float32.

    It does on CUDA (`torch.mm` with `out_dtype`, https://docs.pytorch.org/docs/stable/generated/torch.mm.html) where
    the weights are narrower than float32. The result is part of the key of cached reference rows.
    """
    return device_type == "cuda" and dtype.itemsize < torch.float32.itemsize


def rows_in_chunk(
    vocab_size: int, dtype: torch.dtype, head_bytes: int, device_type: str, needs_gradient: bool = True
) -> int:
    """Returns the number of rows whose logits fit into `head_bytes`, at least one.

    Bytes per logit: 4 in float32 and 8 in float64. In bfloat16, 4 + 2 on a CPU, for a narrow copy of all logits; on
    CUDA 4, and with gradients 2/16 more, for the first block of `_narrow_in_place`.

    Args:
        vocab_size: V.
        dtype: the dtype of the head's weights.
        head_bytes: the maximum bytes of all tensors of width V.
        device_type: the device type whose code path is taken.
        needs_gradient: whether there will be a backward pass.
    """
    wide = _logits_dtype(dtype)
    bytes_each: float = wide.itemsize
    if has_float32_product(device_type, dtype):
        bytes_each += dtype.itemsize / NARROW_BLOCKS if needs_gradient else 0
    elif dtype != wide:
        bytes_each += dtype.itemsize
    return max(1, int(head_bytes // (vocab_size * bytes_each)))


def recomputed_share(num_rows: int, vocab_size: int, dtype: torch.dtype, head_bytes: int, device_type: str) -> float:
    """Returns the share of a micro-batch's rows, from 0 to 1, whose logits the backward pass recomputes: all rows
    except the last chunk's.

    Args:
        num_rows: R, rows of the micro-batch that the head computes.
        vocab_size: V.
        dtype: the dtype of the head's weights.
        head_bytes: the maximum bytes of all tensors of width V.
        device_type: the device type whose code path is taken, cpu or cuda.
    """
    return max(0.0, 1.0 - rows_in_chunk(vocab_size, dtype, head_bytes, device_type) / max(1, num_rows))


def _logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of logits for weights of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ChunkedTokenLogProbs(Function):
    """Computes log softmax(hidden weight^T + bias)[targets], (R,) nats, with the logits of one chunk at a time.

    The gradient of a row with logits z, target t and output gradient g is dz = g (onehot(t) - softmax(z)).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunking: Chunking
    ) -> Tensor:
        """Returns the log-probability of each target; saves the inputs and the log softmax of the last chunk.

        Args:
            ctx: autograd's context.
            hidden: (R, H).
            weight: (V, H), in the dtype of `hidden`.
            bias: (V,) or None.
            targets: (R,) int64 token ids.
            chunking: how many rows have logits at a time.

        Returns:
            (R,) nats, float32, or float64 where the weights are float64.
        """
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
        """Returns the gradients of hidden (R, H), weight (V, H) and bias (V,)."""
        hidden, weight, bias, targets = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        kept, ctx.last_chunk = ctx.last_chunk, None  # it is overwritten below, and freed with this call
        buffer = _buffer(ctx.chunks, weight) if kept is None else kept
        # Sums over chunks are in the precision of logits: bfloat16 would round after every chunk.
        sum_dtype = grad.dtype if len(ctx.chunks) > 1 else weight.dtype
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.empty_like(weight, dtype=sum_dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if need_bias else None
        for rows in reversed(ctx.chunks):
            is_last = rows == ctx.chunks[-1]
            if kept is None or not is_last:
                _log_softmax(hidden[rows], weight, bias, buffer, ctx.is_wide)
            # dz = softmax(z) - onehot(t) here; it is scaled by -g below.
            dz = buffer[: rows.stop - rows.start].exp_()
            dz[torch.arange(len(dz), device=dz.device), targets[rows]] -= 1
            scale = -grad[rows, None]
            if grad_bias is not None:
                grad_bias.addmv_(dz.T, scale[:, 0])
            narrow = _narrow_in_place(dz, weight.dtype) if ctx.is_wide else dz.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.mm(narrow, weight) * scale
            if grad_weight is not None:
                _add_product(grad_weight, None if ctx.is_wide else dz, narrow, hidden[rows] * scale, keep=not is_last)
            del narrow  # frees its memory before the next chunk's logits
        return grad_hidden, _like(grad_weight, weight), _like(grad_bias, bias), None, None


def _chunks(num_rows: int, chunk: int) -> list[slice]:
    """Returns the rows of each chunk, at least one chunk. All chunks but the first have `chunk` rows, so that the
    last, which is not recomputed, is as large as possible.
    """
    stops = range(num_rows, 0, -chunk) or [0]
    return [slice(max(0, stop - chunk), stop) for stop in reversed(stops)]


def _buffer(chunks: list[slice], weight: Tensor) -> Tensor:
    """Returns the memory that the logits of all chunks share, since on a CPU new memory costs about as much as filling
    it.
    """
    last = chunks[-1]
    return weight.new_empty(last.stop - last.start, weight.shape[0], dtype=_logits_dtype(weight.dtype))


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, is_wide: bool) -> Tensor:
    """Computes the log softmax of the logits of some rows, (rows, V), in the first rows of the buffer."""
    out = buffer[: len(hidden)]
    if is_wide:
        _float32_product(hidden, weight.T, out, keep=False)
        if bias is not None:
            out += bias
    else:
        _put_logits(hidden, weight, bias, out)
    # In place: torch's kernels do not read a row's elements after they have written them.
    return torch.log_softmax(out, -1, out=out)


def _put_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Computes logits in the dtype of the head's weights, then converts them, as the model's own forward does."""
    narrow = out if out.dtype == weight.dtype else None
    if bias is None:
        logits = torch.mm(hidden, weight.T, out=narrow)
    else:
        logits = torch.addmm(bias, hidden, weight.T, out=narrow)
    if narrow is None:
        out.copy_(logits)


def _float32_product(left: Tensor, right: Tensor, total: Tensor, keep: bool) -> None:
    """Computes total = left right, plus total where `keep`: a float32 sum of products of narrow factors, on CUDA only.

    A bias is added separately, since it is not documented that `addmm` takes a narrow bias with a float32 result.
    """
    torch.addmm(total, left, right, out_dtype=total.dtype, beta=int(keep), out=total)


def _narrow_in_place(dz: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts dz (rows, V), contiguous float32, to a dtype of half its width, in the first half of its own memory.

    Block [a, b) of the elements is written to the bytes of [a/2, b/2). Where b <= 2a these bytes were read before, so
    that no copy is needed. Blocks therefore double in size, and only the first, 1/16 of the whole, is copied: 4 + 2/16
    bytes per element instead of 4 + 2, with six kernels instead of one. An example with 32 elements: blocks [0, 2),
    [2, 4), [4, 8), [8, 16), [16, 32), of which [8, 16) is written to the memory of [4, 8).
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
    """Computes total (V, H) = dz^T hidden, plus total where `keep`, without another tensor of this size. `dz` is None
    where `narrow` has taken its memory.
    """
    if total.dtype == narrow.dtype:
        torch.addmm(total, narrow.T, hidden.to(total.dtype), beta=int(keep), out=total)
    elif dz is None:
        _float32_product(narrow.T, hidden.to(narrow.dtype), total, keep)
    else:
        torch.addmm(total, dz.T, hidden.to(total.dtype), beta=int(keep), out=total)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Returns the gradient in the dtype of its parameter."""
    return None if grad is None or parameter is None else grad.to(parameter.dtype)
