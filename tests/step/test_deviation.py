"""The clause on the first step's losses: what the measured log-ratios explain passes, any other loss does not."""

import math

import numpy as np
import pytest
import torch

from dpo.config import LossConfig
from dpo.step.deviation import PairLosses, expected_losses, wrong_loss
from dpo.step.losses import preference_losses
from tests.step.test_first_step import LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_at_margin_0_it_is_that_of_an_indifferent_policy(name: str) -> None:
    loss, expected = LOSSES[name]
    assert expected_losses(np.zeros(1), np.zeros(1), loss).tolist() == pytest.approx([expected], rel=1e-12)


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
    winners, losers = np.array([0.5, -1.5]), np.array([-1.5, 0.5])
    assert expected_losses(winners, losers, loss).tolist() == pytest.approx(expected, rel=1e-12)


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
        found = preference_losses(pi, ref, LENGTHS, WINNERS, LOSERS, loss)
        ratios = (pi - ref) / (LENGTHS if loss.length_normalized else 1)
        right = expected_losses(ratios[WINNERS].numpy(), ratios[LOSERS].numpy(), loss)
        assert wrong_loss(PairLosses(found.numpy(), right)) is None


@pytest.mark.parametrize("offset", [-1e-6, 1e-6])
def test_the_loss_that_is_off_the_most_is_told(offset: float) -> None:
    """One of 2,500 by a millionth of it is more than float64 rounds; nothing is off by as much as 1e-10."""
    right = np.array([0.7, 2500.0, 1.0])
    assert wrong_loss(PairLosses(right * (1 + 1e-10), right)) is None
    assert wrong_loss(PairLosses(right * [1 + offset, 1 + offset, 1], right)) == (2500 * (1 + offset), 2500.0)


def test_no_pairs_are_right() -> None:
    assert wrong_loss(PairLosses(np.empty(0), np.empty(0))) is None
