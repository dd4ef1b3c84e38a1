"""Hidden states to log-probabilities of completions, without a tensor of (rows x vocabulary).

The head is run a chunk of rows at a time; the backward pass computes a chunk's logits again instead of keeping them.
R rows predict R completion tokens of B completions; H is the hidden size, V the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
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
    another, lengths (B,) counts them; one without rows gets 0. Logits are float32 (float64 where the weights are):
    where all fit into `head_bytes` they are kept for the backward pass, which is faster; else no more than that exist
    at a time.
    """
    rows_in_budget = max(1, head_bytes // (weight.shape[0] * _logits_dtype(weight).itemsize))
    if rows_in_budget >= hidden.shape[0]:
        token_logps = full_token_log_probs(hidden, weight, bias, targets)
    else:
        token_logps = ChunkedTokenLogProbs.apply(hidden, weight, bias, targets, rows_in_budget)
    # In float64, and not by index_add, whose order of addition on CUDA changes from run to run.
    sums = torch.segment_reduce(token_logps.double(), "sum", lengths=lengths, unsafe=True)
    return sums.to(token_logps.dtype)


def full_token_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(hidden weight^T + bias)[targets], (R,) nats: the plain form, through autograd."""
    return -F.cross_entropy(_logits(hidden, weight, bias), targets, reduction="none")


def _logits_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The head in the dtype of its weights, then widened, as the model's own forward does: (R, V)."""
    return F.linear(hidden, weight, bias).to(_logits_dtype(weight))


class ChunkedTokenLogProbs(Function):
    """`full_token_log_probs` with the logits of `chunk` rows in memory at a time; the backward pass recomputes them.

    For a row with logits z, target t and output gradient g:  dz = g (onehot(t) - softmax(z)).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        """(R,) log-probabilities of the targets; keeps the inputs and the (R,) log-normalizers."""
        out = torch.empty(hidden.shape[0], dtype=_logits_dtype(weight), device=hidden.device)
        log_normalizers = torch.empty_like(out)
        for rows in _chunks(hidden.shape[0], chunk):
            logits = _logits(hidden[rows], weight, bias)
            log_normalizers[rows] = logits.logsumexp(-1)
            out[rows] = logits.gather(1, targets[rows, None])[:, 0] - log_normalizers[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, log_normalizers)
        ctx.chunk = chunk
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden (R, H), weight (V, H), bias (V,)."""
        hidden, weight, bias, targets, log_normalizers = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Sums over chunks in the logits' precision: bfloat16 would round at every chunk.
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if need_bias else None
        for rows in _chunks(hidden.shape[0], ctx.chunk):
            dz = _logits(hidden[rows], weight, bias)
            dz.sub_(log_normalizers[rows, None]).exp_().mul_(-grad[rows, None])
            dz.scatter_add_(1, targets[rows, None], grad[rows, None])
            dz = dz.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(dz, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += dz.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += dz.sum(0)
        return grad_hidden, _like(grad_weight, weight), _like(grad_bias, bias), None, None


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)


def _chunks(num_rows: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk)]
