"""Hidden states to log-probabilities of completions, without a tensor of (rows x vocabulary).

The head is run a chunk of rows at a time, as many as a budget of bytes allows; the backward pass computes the logits
of a chunk again instead of keeping them, but for the last chunk, which is still there: where one chunk holds all rows,
nothing is computed twice. R rows predict R completion tokens of B completions; H is the hidden size, V the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def completion_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lengths: Tensor,
    head_bytes: int,
) -> Tensor:
    """Log-probability of each completion given its prompt, summed over its tokens: (B,) nats.

    hidden (R, H), weight (V, H) and bias (V,) of the head, targets (R,) token ids. The rows of a completion follow one
    another, lengths (B,) counts them; one without rows gets 0. Logits are float32 (float64 where the weights are).
    All that is as wide as the vocabulary and lives at once, in either pass, takes at most `head_bytes`, or a single
    row.
    """
    chunk = rows_in_chunk(weight.shape[0], weight.dtype, head_bytes)
    token_logps = ChunkedTokenLogProbs.apply(hidden, weight, bias, targets, chunk)
    # In float64, and not by index_add, whose order of addition on CUDA changes from run to run.
    sums = torch.segment_reduce(token_logps.double(), "sum", lengths=lengths, unsafe=True)
    return sums.to(token_logps.dtype)


def rows_in_chunk(vocab_size: int, dtype: torch.dtype, head_bytes: int) -> int:
    """Rows whose logits fit into `head_bytes`; `dtype` is that in which the head computes.

    A logit takes its own bytes, and where the head computes in less than float32 those of its narrow copy too:
    4 in float32, 8 in float64, 4 + 2 in bfloat16.
    """
    wide = _logits_dtype(dtype)
    bytes_each = wide.itemsize + (dtype.itemsize if dtype != wide else 0)
    return max(1, head_bytes // (vocab_size * bytes_each))


def recomputed_share(num_rows: int, vocab_size: int, dtype: torch.dtype, head_bytes: int) -> float:
    """Part of a micro-batch's rows, from 0 to 1, whose logits the backward pass computes again: all but a chunk's."""
    return max(0.0, 1.0 - rows_in_chunk(vocab_size, dtype, head_bytes) / max(1, num_rows))


def _logits_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class ChunkedTokenLogProbs(Function):
    """log softmax(hidden weight^T + bias)[targets], (R,) nats, with the logits of `chunk` rows in memory at a time.

    For a row with logits z, target t and output gradient g:  dz = g (onehot(t) - softmax(z)).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        """(R,) log-probabilities of the targets; keeps the inputs, and the log softmax of the last chunk."""
        ctx.chunks = _chunks(hidden.shape[0], chunk)
        out = torch.empty(hidden.shape[0], dtype=_logits_dtype(weight.dtype), device=hidden.device)
        buffer = _buffer(ctx.chunks, weight)
        for rows in ctx.chunks:
            logps = _log_softmax(hidden[rows], weight, bias, buffer)
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
                _log_softmax(hidden[rows], weight, bias, buffer)
            dz = buffer[: rows.stop - rows.start].exp_()  # of the negative logarithm, before it is scaled by g
            dz[torch.arange(len(dz), device=dz.device), targets[rows]] -= 1
            scale = -grad[rows, None]
            narrow = dz.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.mm(narrow, weight) * scale
            if grad_weight is not None:
                _add_product(grad_weight, dz, narrow, hidden[rows] * scale, keep=not is_last)
            if grad_bias is not None:
                grad_bias.addmv_(dz.T, scale[:, 0])
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


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """log softmax of the logits of some rows, (rows, V), in the first rows of the buffer.

    The logits are computed in the dtype of the head's weights, then widened, as the model's own forward does.
    """
    out = buffer[: len(hidden)]
    narrow = out if out.dtype == weight.dtype else None
    if bias is None:
        logits = torch.mm(hidden, weight.T, out=narrow)
    else:
        logits = torch.addmm(bias, hidden, weight.T, out=narrow)
    if narrow is None:
        out.copy_(logits)
    # In place: torch's kernels read a row's last time where they write it.
    return torch.log_softmax(out, -1, out=out)


def _add_product(total: Tensor, dz: Tensor, narrow: Tensor, hidden: Tensor, keep: bool) -> None:
    """total (V, H) = dz^T hidden + (total where it is kept), without another tensor of this size."""
    if total.is_cuda and total.dtype != narrow.dtype:  # narrow factors, their products summed in float32
        torch.addmm(total, narrow.T, hidden.to(narrow.dtype), out_dtype=total.dtype, beta=int(keep), out=total)
    else:
        factor = narrow if total.dtype == narrow.dtype else dz
        torch.addmm(total, factor.T, hidden.to(total.dtype), beta=int(keep), out=total)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)
