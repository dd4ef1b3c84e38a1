"""Log-probabilities of completions: the chunked head against plain autograd and a float64 oracle."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dpo.model.log_probs import (
    ChunkedTokenLogProbs,
    Chunking,
    Head,
    _narrow_in_place,
    completion_log_probs,
    has_float32_product,
    recomputed_share,
    rows_in_chunk,
)
from tests.support.float32_product import float32_products
from tests.support.live_bytes import LiveBytes, allocated_peak

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


def budget_of(chunk: int, itemsize: float = 4) -> int:
    """Bytes into which the logits of so many rows fit."""
    return math.ceil(chunk * VOCAB * itemsize)


def at_chunk(chunk: int, itemsize: float = 4) -> Any:

    def log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        return completion_log_probs(hidden, Head(weight, bias, budget_of(chunk, itemsize)), targets, LENGTHS)

    return log_probs


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
        return completion_log_probs(hidden, Head(weight, bias, budget_of(chunk, 8)), targets, LENGTHS)

    assert torch.autograd.gradcheck(logps, tuple(inputs))


# --- how often gradients are rounded to bfloat16 ---------------------------------------------------------------------


def spacing(x: Tensor) -> Tensor:
    """Between the bfloat16 numbers around x (float64), which have 8 bits: 2^-7 from 1 to 2."""
    return torch.where(x == 0, 0.0, torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 8))


def cut_off(x: Tensor) -> Tensor:
    """The mean square of what rounding x to bfloat16 cuts off, which is spread evenly over the spacing."""
    return spacing(x).square() / 12


@dataclass(frozen=True)
class Exact:
    """The gradients of sum(b * value_b) in float64, and what roundings may do to their norms.

    Roundings are independent, so their mean squares add up, each times the square of what it is multiplied with. The
    norm of some hundred such errors is within a tenth of the root of that sum.
    """

    dz: Tensor
    """(R, V) onehot(target) - softmax(logits)."""
    scale: Tensor
    """(R, 1) b of each row."""
    hidden: Tensor
    weight: Tensor

    def error_of_hidden(self) -> float:
        """Where dz, its product with the weight, and that times b are rounded."""
        product = self.dz @ self.weight
        terms = cut_off(self.dz) @ self.weight.square() + cut_off(product)
        return 1.1 * (self.scale.square() * terms + cut_off(self.scale * product)).sum().sqrt().item()

    def error_of_weight(self) -> float:
        """Where dz, b times hidden, and their product are rounded."""
        scaled = self.scale * self.hidden
        terms = cut_off(self.dz).T @ scaled.square() + self.dz.square().T @ cut_off(scaled)
        return 1.1 * (terms + cut_off(self.dz.T @ scaled)).sum().sqrt().item()


def exact(logits: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor) -> Exact:
    """From these logits, in float64."""
    dz = torch.nn.functional.one_hot(targets, VOCAB) - logits.softmax(-1)
    scale = torch.arange(1.0, len(LENGTHS) + 1).repeat_interleave(LENGTHS)[:, None]
    return Exact(*(tensor.detach().double() for tensor in (dz, scale, hidden, weight)))


def assert_rounded_once(found: Tensor, wanted: Tensor) -> None:
    """Each number is at most half a spacing off, but for the error of float32 sums."""
    assert ((found.double() - wanted).abs() <= spacing(wanted) / 2 + 1e-5).all()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_bfloat16_weights(chunk: int) -> None:
    """The logits are rounded to bfloat16, once, by the head, and everything after is float32: the values are those of a
    float64 log softmax of the rounded logits, and so are the gradients. That of hidden states is a product of rounded
    dz. Those of weight and bias are sums of float32, and rounded once; but where one chunk holds all rows, the weight's
    is a product of rounded factors.
    """
    hidden, weight, bias, targets = inputs = head_inputs(torch.bfloat16)
    logits = torch.nn.functional.linear(hidden, weight, bias).double().detach()
    rounded = logits.log_softmax(-1)[torch.arange(ROWS), targets].split(LENGTHS.tolist())
    logps, *found = values_and_gradients(at_chunk(chunk, 6), inputs)
    assert logps.dtype == torch.float32 and {one.dtype for one in found} == {torch.bfloat16}
    torch.testing.assert_close(logps.double(), torch.stack([part.sum() for part in rounded]), rtol=1e-6, atol=1e-6)
    right = exact(logits, hidden, weight, targets)
    scaled = right.scale * right.hidden
    assert (found[0] - right.scale * (right.dz @ right.weight)).norm() <= right.error_of_hidden()
    if chunk < ROWS:
        assert_rounded_once(found[1], right.dz.T @ scaled)
    else:
        assert (found[1] - right.dz.T @ scaled).norm() <= right.error_of_weight()
    assert_rounded_once(found[2], (right.dz.T @ right.scale)[:, 0])


@pytest.mark.parametrize("is_wide", [False, True])
def test_bfloat16_weight_gradient_is_summed_in_float32(is_wide: bool) -> None:
    """512 rows of probability p = 1/2 a token, each adding 1/2 to the weight's gradient: 256. Summed row by row in
    bfloat16 the sum would stop at 128, where the spacing is 1.
    """
    ones = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    with float32_products():
        logps = ChunkedTokenLogProbs.apply(ones, weight, None, torch.zeros(512, dtype=torch.long), Chunking(is_wide, 1))
        logps.sum().backward()
    assert weight.grad.tolist() == [[256], [-256]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 7, 17, 22, 23, 1000])
def test_float32_product_of_bfloat16_weights(chunk: int, bias: bool) -> None:
    """As on CUDA: logits are the float32 product of bfloat16 factors, and are never rounded to bfloat16. Values agree
    to 1e-6 with float64 on the same factors, where rounded logits are off by more than 1e-4.

    Gradients are products of dz, which is rounded once: see `Exact`. That of the bias is the sum of dz before that.
    However many chunks there are, nothing is rounded more often.
    """
    hidden, weight, offset, targets = inputs = head_inputs(torch.bfloat16, bias)
    wanted = oracle(*inputs).detach()
    with float32_products():
        # 4.125 bytes a logit. A chunk of fewer than 16 rows narrows less than a row at first.
        logps, *found = values_and_gradients(at_chunk(chunk, 4.125), inputs)
    rounded = at_chunk(chunk, 6)(*inputs).detach()
    assert logps.dtype == torch.float32 and {one.dtype for one in found} == {torch.bfloat16}
    assert (logps - wanted).norm() <= 1e-6 * wanted.norm()
    assert (rounded - wanted).norm() > 1e-4 * wanted.norm()
    logits = hidden.double() @ weight.double().T + (0 if offset is None else offset.double())
    right = exact(logits, hidden, weight, targets)
    assert (found[0] - right.scale * (right.dz @ right.weight)).norm() <= right.error_of_hidden()
    assert (found[1] - right.dz.T @ (right.scale * right.hidden)).norm() <= right.error_of_weight()
    if bias:
        assert_rounded_once(found[2], (right.dz.T @ right.scale)[:, 0])


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 33, 1000, 4099])
def test_narrowing_in_place_rounds_every_number_once(count: int) -> None:
    dz = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    wanted, memory = dz.bfloat16(), dz.data_ptr()
    narrow = _narrow_in_place(dz, torch.bfloat16)
    assert torch.equal(narrow, wanted)
    assert narrow.data_ptr() == memory and narrow.is_contiguous()


def test_who_has_the_float32_product() -> None:
    """On CUDA what is narrower than float32, and nothing on a CPU, whose results stay as they were."""
    kinds = [(device, dtype) for device in ("cpu", "cuda") for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    assert [kind for kind in kinds if has_float32_product(*kind)] == [("cuda", torch.bfloat16)]


def test_rows_in_a_chunk() -> None:
    """Of Llama 3's vocabulary, 128,256, in 256 MiB = 2^28 bytes: bytes a logit are 4, 4.125, 6 and 8."""
    per_byte = 2**28 / 128_256

    def rows(dtype: torch.dtype, device_type: str, needs_gradient: bool) -> int:
        return rows_in_chunk(128_256, dtype, 2**28, device_type, needs_gradient)

    for needs_gradient, on_cuda in ((False, 4), (True, 4.125)):
        assert rows(torch.bfloat16, "cuda", needs_gradient) == int(per_byte / on_cuda)
        assert rows(torch.bfloat16, "cpu", needs_gradient) == int(per_byte / 6)
        for device_type in ("cuda", "cpu"):
            assert rows(torch.float32, device_type, needs_gradient) == int(per_byte / 4)
            assert rows(torch.float64, device_type, needs_gradient) == int(per_byte / 8)


def test_completion_without_tokens_is_0_and_has_no_gradient() -> None:
    *inputs, targets = head_inputs()
    hidden, weight, bias = inputs
    logps = completion_log_probs(hidden, Head(weight, bias, MIB), targets, LENGTHS)
    assert logps[1] == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(logps[1], inputs))


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, bias, targets = head_inputs()
    logps = completion_log_probs(hidden.detach(), Head(weight, bias.detach(), budget_of(3)), targets, LENGTHS)
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
        logps = completion_log_probs(hidden, Head(weight, None, head_bytes), targets, torch.tensor([1, 1]))
        assert logps.tolist() == [0, -2e4]
        assert torch.autograd.grad(logps.sum(), hidden)[0].flatten().tolist() == [0, -2]


# --- memory ----------------------------------------------------------------------------------------------------------

MANY, WIDE = 64, 1000


def wide_head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (64, 2), weight (1000, 2), targets (64,), lengths (2,): logits are 500 times as wide as hidden states."""
    hidden = torch.randn(MANY, 2, dtype=dtype, requires_grad=True)
    weight = torch.randn(WIDE, 2, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.zeros(MANY, dtype=torch.long), torch.tensor([30, 34])


def small_change(dtype: torch.dtype) -> int:
    """What is no wider than the hidden size, bytes: some copies of the rows, and the weight's gradient, summed in
    float32 and given in the weight's dtype.
    """
    return 12 * MANY * 8 + 2 * WIDE * (4 + 2 if dtype == torch.bfloat16 else dtype.itemsize)


def both_passes(dtype: torch.dtype, budget: int) -> None:
    hidden, weight, targets, lengths = wide_head(dtype)
    completion_log_probs(hidden, Head(weight, None, budget), targets, lengths).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 5, 63, 64, 1000])
def test_the_budget_is_what_is_allocated_at_once(chunk: int, dtype: torch.dtype) -> None:
    """The allocator's peak, temporaries inside of operations too, is that of the chunk's logits, min(chunk, 64) x 1000
    x 4 bytes in float32, and what is no wider than the hidden size. It is reached: the meter does see it.
    """
    peak = allocated_peak(lambda: both_passes(dtype, chunk * WIDE * dtype.itemsize))
    wanted = min(chunk, MANY) * WIDE * dtype.itemsize
    inputs = (MANY + WIDE) * 2 * dtype.itemsize
    assert wanted <= peak <= wanted + small_change(dtype) + inputs


@pytest.mark.parametrize("chunk", [1, 5, 63, 64, 1000])
def test_the_budget_in_bfloat16(chunk: int) -> None:
    """Two bytes of the head's own logits, four of the float32 ones: storages alone, since a CPU's products in bfloat16
    take memory of their own.
    """
    with LiveBytes() as live:
        both_passes(torch.bfloat16, chunk * WIDE * 6)
    wanted = min(chunk, MANY) * WIDE * 6
    assert wanted <= live.peak <= wanted + small_change(torch.bfloat16) + (MANY + WIDE) * 2 * 2


@pytest.mark.parametrize("chunk", [1, 5, 16, 63, 64, 1000])
def test_the_budget_of_the_float32_product(chunk: int) -> None:
    """As on CUDA: 4 bytes a logit, and with gradients 1/16 of the chunk once more in two; 4 alone without them, so that
    the same budget holds more rows.
    """
    budget = math.ceil(chunk * WIDE * 4.125)
    with float32_products(), LiveBytes() as live:
        both_passes(torch.bfloat16, budget)
    wanted = min(chunk, MANY) * WIDE * 4.125
    assert wanted - 1 <= live.peak <= wanted + small_change(torch.bfloat16) + (MANY + WIDE) * 2 * 2
    with float32_products(), torch.no_grad(), LiveBytes() as live:
        hidden, weight, targets, lengths = wide_head(torch.bfloat16)
        completion_log_probs(hidden, Head(weight, None, budget), targets, lengths)
    wanted = min(math.floor(chunk * 4.125 / 4), MANY) * WIDE * 4
    assert wanted <= live.peak <= wanted + small_change(torch.bfloat16) + (MANY + WIDE) * 2 * 2


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, targets, lengths = wide_head(torch.float32)
    with torch.no_grad(), LiveBytes() as live:
        logps = completion_log_probs(hidden, Head(weight, None, 5 * WIDE * 4), targets, lengths)
        assert live.now <= logps.nbytes
    assert 5 * WIDE * 4 <= live.peak <= 5 * WIDE * 4 + small_change(torch.float32)


def test_after_the_backward_pass_nothing_is_kept() -> None:
    """Though the results still hold the graph, as the last micro-batch's do while the next one runs."""
    hidden, weight, targets, lengths = wide_head(torch.float32)
    with LiveBytes() as live:
        logps = completion_log_probs(hidden, Head(weight, None, MIB), targets, lengths)
        assert live.now >= MANY * WIDE * 4
        logps.sum().backward()
        assert live.now < small_change(torch.float32)


def test_a_second_backward_pass_computes_anew_what_the_first_used_up() -> None:
    inputs = head_inputs(torch.float64)
    logps = ChunkedTokenLogProbs.apply(*inputs, Chunking(False, 5)).sum()
    first = torch.autograd.grad(logps, inputs[:3], retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(logps, inputs[:3]), strict=True):
        assert (one - other).norm() <= 1e-13 * other.norm()


@pytest.mark.parametrize(("rows", "share"), [(5, 0.0), (6, 1 / 6), (20, 0.75)])
def test_all_but_one_chunk_is_computed_again(rows: int, share: float) -> None:
    """5 rows fit into the budget. FLOPs: 2 H V a row and matrix product; one forward, two backward, and one for the
    rows that are computed again.
    """
    hidden, weight, targets, _ = wide_head(torch.float32)
    assert recomputed_share(rows, WIDE, torch.float32, 5 * WIDE * 4, "cpu") == pytest.approx(share)
    with FlopCounterMode(display=False) as counter:
        head = Head(weight, None, 5 * WIDE * 4)
        completion_log_probs(hidden[:rows], head, targets[:rows], torch.tensor([rows])).sum().backward()
    assert counter.get_total_flops() == pytest.approx(2 * 2 * WIDE * rows * (3 + share))
