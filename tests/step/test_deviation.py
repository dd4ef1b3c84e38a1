"""The clause on the first step's losses: what the measured log-ratios explain passes, any other loss does not."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.step import losses
from dpo.step.deviation import PairLosses, expected_losses, losses_at_zero, wrong_loss
from dpo.step.losses import Loss
from tests.step.test_first_step import LOSSES
from tests.support.pair_losses import losses_of

OF_THE_MARGIN = [name for name in LOSSES if LOSSES[name][0].name in ("dpo", "ipo", "hinge", "robust")]
"""The losses of h alone."""


def of_log_ratios(log_ratios: np.ndarray, loss: LossConfig) -> list[float]:
    """The expected losses of pairs with these log-ratios (2, T), of completions of one token."""
    return expected_losses(log_ratios, np.zeros_like(log_ratios), np.ones_like(log_ratios), loss).tolist()


@pytest.mark.parametrize("name", LOSSES)
def test_at_margin_0_it_is_that_of_an_indifferent_policy(name: str) -> None:
    loss, expected = LOSSES[name]
    assert of_log_ratios(np.zeros((2, 1)), loss) == pytest.approx([expected], rel=1e-12)
    assert losses_at_zero(loss) == pytest.approx((expected, expected), rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LossConfig(beta=0.5), [math.log1p(math.exp(-1)), math.log1p(math.exp(1))]),
        (LossConfig(beta=0.5, label_smoothing=0.25), [math.log1p(math.exp(-1)) + 0.25, math.log1p(math.exp(1)) - 0.25]),
        (LossConfig(name="ipo", beta=0.5), [1.0, 9.0]),
        (LossConfig(name="hinge", beta=0.5), [0.0, 2.0]),
        (
            LossConfig(name="robust", beta=0.5, label_smoothing=0.25),
            [math.log1p(math.exp(-1)) - 0.5, math.log1p(math.exp(1)) + 0.5],
        ),
    ],
)
def test_at_margins_of_2_nats(loss: LossConfig, expected: list[float]) -> None:
    """beta h = 1 and -1, where log(1 + e^x) - log(1 + e^-x) = x: smoothing by 1/4 adds (beta h)/4, and robust, with
    weights 3/2 and -1/2, takes (beta h)/2 away.
    """
    log_ratios = np.array([[0.5, -1.5], [-1.5, 0.5]])
    assert of_log_ratios(log_ratios, loss) == pytest.approx(expected, rel=1e-12)


WINNERS, LOSERS = torch.tensor([0, 0, 1, 3, 4]), torch.tensor([1, 2, 2, 4, 3])
"""Pairs of five completions, most of which win one pair and lose another."""
LENGTHS = torch.tensor([3, 40, 7, 1, 12])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("nats", [0.0, 1e-5, 0.1, 3.0, 100.0])
def test_the_loss_of_any_log_ratios_passes(nats: float, name: str) -> None:
    """However far policy and reference are apart: how far they may be is judged by itself."""
    random, loss = torch.Generator().manual_seed(0), LOSSES[name][0]
    for _ in range(20):
        ref = -100 * torch.rand(5, generator=random).double()
        pi = ref + nats * torch.randn(5, generator=random)
        found = losses_of(pi, ref, LENGTHS, WINNERS, LOSERS, loss)
        pairs = torch.stack([WINNERS, LOSERS])
        right = expected_losses(pi[pairs].numpy(), ref[pairs].numpy(), LENGTHS[pairs].numpy(), loss)
        assert wrong_loss(PairLosses(found.numpy(), right)) is None


def test_margins_of_the_pairs_by_hand() -> None:
    """beta 1/2, margin m: log(1 + e^-(beta h - m)) of beta h = 1 and -1 with m = 1 and -1 is ln 2."""
    log_ratios, zeros = np.array([[0.5, -1.5], [-1.5, 0.5]]), np.zeros((2, 2))
    found = expected_losses(log_ratios, zeros, zeros + 1, LossConfig(beta=0.5), np.array([1.0, -1.0]))
    assert found.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-12)


@pytest.mark.parametrize("offset", [-1e-6, 1e-6])
def test_the_loss_that_is_off_the_most_is_told(offset: float) -> None:
    """One of 2,500 by a millionth of it is more than float64 rounds; nothing is off by as much as 1e-10."""
    right = np.array([0.7, 2500.0, 1.0])
    assert wrong_loss(PairLosses(right * (1 + 1e-10), right)) is None
    assert wrong_loss(PairLosses(right * [1 + offset, 1 + offset, 1], right)) == (2500 * (1 + offset), 2500.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_wrong(bad: float) -> None:
    """Also where the loss of the same pair alone is not finite, and beside one that is off by a finite number."""
    right = np.array([0.7, bad])
    found, expected = wrong_loss(PairLosses(np.array([0.8, bad]), right)) or (0.0, 0.0)
    np.testing.assert_equal((found, expected), (bad, bad))


def test_no_pairs_are_right() -> None:
    assert wrong_loss(PairLosses(np.empty(0), np.empty(0))) is None


# --- an entry of the table that is not what it says ------------------------------------------------------------------


def replaced(entry: Loss, function: Callable[[Tensor], Tensor]) -> Loss:
    """The entry with a function of its losses in their place."""
    return Loss(lambda *args: function(entry.losses(*args)), entry.at_zero)


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "robust"])
def test_an_entry_with_another_value_at_zero_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probability instead of its logarithm: exp(-ln 2) = 1/2, where ln 2 is right."""
    loss, expected = LOSSES[name]
    monkeypatch.setitem(losses.LOSSES, loss.name, replaced(losses.LOSSES[loss.name], lambda values: torch.exp(-values)))
    found, right = losses_at_zero(loss)
    assert (found, right) == (pytest.approx(math.exp(-expected)), pytest.approx(expected))
    assert wrong_loss(PairLosses(np.array([found]), np.array([right]))) == (found, right)


@pytest.mark.parametrize("name", OF_THE_MARGIN)
@pytest.mark.parametrize("nats", [1e-5, 0.1, 3.0, 100.0])
def test_a_right_loss_lies_within_its_values_at_the_ends(nats: float, name: str) -> None:
    """Convex in h: on [-H, H], with H = |winner's log-ratio| + |loser's|, no loss is further from its value at 0 than
    at one of the two ends.
    """
    loss, at_zero = LOSSES[name]
    log_ratios = np.random.default_rng(0).normal(scale=nats, size=(2, 50))
    ends = np.abs(log_ratios) * [[1], [-1]]
    found = np.array(of_log_ratios(log_ratios, loss)) - at_zero
    bounds = [np.abs(np.array(of_log_ratios(sign * ends, loss)) - at_zero) for sign in (1, -1)]
    assert (np.abs(found) <= np.maximum(*bounds) * (1 + 1e-12) + 1e-12).all()
