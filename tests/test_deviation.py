"""The clause on the first step's losses: what the measured log-ratios explain passes, any other loss does not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.deviation import loss_excess
from dpo.losses import preference_losses
from tests.test_first_step import LOSSES

WINNERS, LOSERS = torch.tensor([0, 0, 1, 3, 4]), torch.tensor([1, 2, 2, 4, 3])
"""Pairs of five completions, most of which win one pair and lose another."""
LENGTHS = torch.tensor([3, 40, 7, 1, 12])


def excess(pi: Tensor, ref: Tensor, loss: LossConfig) -> float:
    return loss_excess(pi, ref, LENGTHS, WINNERS, LOSERS, loss).item()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("nats", [0.0, 1e-5, 0.1, 3.0, 100.0])
def test_the_loss_of_any_log_ratios_passes(nats: float, name: str) -> None:
    """However far policy and reference are apart: how far they may be is judged by itself."""
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        ref = -100 * torch.rand(5, generator=random)
        assert excess(ref + nats * torch.randn(5, generator=random), ref, LOSSES[name][0]) == 0


def replaced(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    monkeypatch.setattr("dpo.deviation.preference_losses", wrong)


def without_reference(pi: Tensor, ref: Tensor, *others: Any) -> Tensor:
    return preference_losses(pi, torch.zeros_like(ref), *others)


def test_a_loss_that_forgets_the_reference_is_told_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """pi = ref = -50 and -20 nats, beta 0.1: -log sigmoid(-3) = 3.0486 for ln 2 = 0.6931 where nothing was learned."""
    replaced(monkeypatch, without_reference)
    logps, winner, loser = torch.tensor([-50.0, -20.0]), torch.tensor([0]), torch.tensor([1])
    found = loss_excess(logps, logps, torch.tensor([9, 9]), winner, loser, LossConfig())
    assert found.item() == pytest.approx(3.0485874 - math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("offset", [-0.02, 0.02])
def test_a_loss_that_is_off_does_not_pass(offset: float, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 5 pairs by 0.02 where log-ratios are 0."""
    replaced(monkeypatch, lambda pi, *others: preference_losses(pi, *others) + offset * (pi < 0).all())
    ref = torch.tensor([-50.0, -20.0, -9.0, -3.0, -30.0])
    assert excess(ref, ref, LOSSES[name][0]) == pytest.approx(5 * 0.02, rel=1e-6)


def test_a_loss_of_other_completions_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each completion has the log-ratio of the one before it; only one of them is off, by 1 nat."""

    def shifted(pi: Tensor, ref: Tensor, *others: Any) -> Tensor:
        return preference_losses((pi - ref).roll(1), torch.zeros_like(ref), *others)

    ref = torch.tensor([-50.0, -20.0, -9.0, -3.0, -30.0])
    pi = ref + torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    assert excess(pi, ref, LossConfig()) == 0
    replaced(monkeypatch, shifted)
    assert excess(pi, ref, LossConfig()) > 0.01
