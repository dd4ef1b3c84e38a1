"""Log-probabilities of completions: the chunked head against plain autograd and a float64 oracle."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo.log_probs import ChunkedTokenLogProbs, completion_log_probs, full_token_log_probs

ROWS, WIDTH, VOCAB = 23, 12, 41
LENGTHS = torch.tensor([4, 0, 9, 1, 9])
MIB = 2**20


def head_inputs(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(hidden (23, 12), weight (41, 12), bias (41,), targets (23,)) with logits of several nats."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=random).to(dtype).requires_grad_()
    offset = torch.randn(VOCAB, generator=random).to(dtype).requires_grad_()
    return hidden, weight, offset if bias else None, torch.randint(VOCAB, (ROWS,), generator=random)


def oracle(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax of the logits in float64, completion by completion in a Python loop: (B,)."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    token_logps = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    return torch.stack([part.sum() for part in token_logps.split(LENGTHS.tolist())])


def values_and_gradients(function: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The (B,) values, and the gradients of sum(b * value_b) for hidden, weight and bias, where b counts from 1."""
    logps = function(*inputs)
    parameters = [tensor for tensor in inputs[:3] if tensor is not None]
    loss = (torch.arange(1, len(logps) + 1) * logps).sum()
    return [logps.detach(), *torch.autograd.grad(loss, parameters)]


def budget_of(chunk: int, itemsize: int = 4) -> int:
    """Bytes into which the logits of so many rows fit."""
    return chunk * VOCAB * itemsize


def at_chunk(chunk: int, itemsize: int = 4) -> Any:
    return lambda *inputs: completion_log_probs(*inputs, LENGTHS, budget_of(chunk, itemsize))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 2, 7, 22, 23, 1000])
def test_values_and_gradients(chunk: int, bias: bool) -> None:
    """Any budget, down to less than a row: float32 within 1e-5 of the float64 oracle, tensor by tensor."""
    inputs = head_inputs(bias=bias)
    found, wanted = values_and_gradients(at_chunk(chunk), inputs), values_and_gradients(oracle, inputs)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_values_and_gradients_in_float64(chunk: int) -> None:
    inputs = head_inputs(torch.float64)
    for one, other in zip(
        values_and_gradients(at_chunk(chunk, 8), inputs), values_and_gradients(oracle, inputs), strict=True
    ):
        assert one.dtype == torch.float64
        assert (one - other).norm() <= 1e-13 * other.norm()


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_gradcheck(chunk: int) -> None:
    """Against finite differences, the targets and lengths fixed."""
    *inputs, targets = head_inputs(torch.float64)

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return completion_log_probs(hidden, weight, bias, targets, LENGTHS, budget_of(chunk, 8))

    assert torch.autograd.gradcheck(logps, tuple(inputs))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_bfloat16_weights(chunk: int) -> None:
    """The logits are rounded to bfloat16, once, by the head, and everything after is float32: the values are those of a
    float64 log softmax of the rounded logits; the gradients, products of bfloat16, agree to 2^-7 a tensor.
    """
    hidden, weight, bias, targets = inputs = head_inputs(torch.bfloat16)
    logits = torch.nn.functional.linear(hidden, weight, bias).double()
    rounded = logits.log_softmax(-1)[torch.arange(ROWS), targets].split(LENGTHS.tolist())
    found, wanted = values_and_gradients(at_chunk(chunk), inputs), values_and_gradients(oracle, inputs)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), torch.stack([part.sum() for part in rounded]), rtol=1e-6, atol=1e-6)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other.double()).norm() <= 2**-7 * other.double().norm()


def test_bfloat16_weight_gradient_is_summed_in_float32() -> None:
    """512 rows of probability p = 1/2 a token, each adding 1/2 to the weight's gradient: 256. Summed row by row in
    bfloat16 the sum would stop at 128, where the spacing is 1.
    """
    ones = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logps = ChunkedTokenLogProbs.apply(ones, weight, None, torch.zeros(512, dtype=torch.long), 1)
    logps.sum().backward()
    assert weight.grad.tolist() == [[256], [-256]]


def test_completion_without_tokens_is_0_and_has_no_gradient() -> None:
    *inputs, targets = head_inputs()
    logps = completion_log_probs(*inputs, targets, LENGTHS, MIB)
    assert logps[1] == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(logps[1], inputs))


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, bias, targets = head_inputs()
    logps = completion_log_probs(hidden.detach(), weight, bias.detach(), targets, LENGTHS, budget_of(3))
    logps.sum().backward()
    assert hidden.grad is None
    assert bias.grad is None
    wanted = torch.autograd.grad(oracle(hidden, weight, bias, targets).sum(), weight)[0]
    assert (weight.grad - wanted).norm() <= 1e-5 * wanted.norm()


def test_extreme_logits_stay_finite() -> None:
    """Logits of ±1e4: the likeliest token has log-probability 0, the other -2e4, no overflow in exp."""
    hidden = torch.tensor([[1e4], [1e4]]).requires_grad_()
    weight, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    for head_bytes in (8, MIB):
        logps = completion_log_probs(hidden, weight, None, targets, torch.tensor([1, 1]), head_bytes)
        assert logps.tolist() == [0, -2e4]
        assert torch.autograd.grad(logps.sum(), hidden)[0].flatten().tolist() == [0, -2]


# --- memory ----------------------------------------------------------------------------------------------------------


class LargestResult(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


def largest_result(head_bytes: int) -> int:
    """Elements of the largest tensor in forward and backward of 64 rows, hidden size 2, a vocabulary of 1,000."""
    hidden = torch.randn(64, 2, requires_grad=True)
    weight = torch.randn(1000, 2, requires_grad=True)
    targets, lengths = torch.zeros(64, dtype=torch.long), torch.tensor([30, 34])
    with LargestResult() as largest:
        completion_log_probs(hidden, weight, None, targets, lengths, head_bytes).sum().backward()
    return largest.numel


def test_no_tensor_of_rows_times_vocabulary() -> None:
    """A budget of 5 rows of logits: 5,000 elements are the most in either pass; the full path makes 64,000, so the
    meter does see them.
    """
    assert largest_result(5 * 1000 * 4) == 5000
    assert largest_result(64 * 1000 * 4) == 64000


def test_nothing_of_the_logits_is_kept_for_the_backward_pass() -> None:
    """Saved between the passes: hidden, weight, bias, targets and one normalizer a row."""
    inputs, saved = head_inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ChunkedTokenLogProbs.apply(*inputs, 5)
    assert sorted(t.numel() for t in saved) == sorted([ROWS * WIDTH, VOCAB * WIDTH, VOCAB, ROWS, ROWS])


def test_the_full_form_is_the_chunked_form() -> None:
    inputs = head_inputs(torch.float64)
    chunked = ChunkedTokenLogProbs.apply(*inputs, 5)
    torch.testing.assert_close(full_token_log_probs(*inputs), chunked, rtol=1e-13, atol=1e-13)
