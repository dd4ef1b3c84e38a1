"""Losses against published metrics, hand-derived numbers and finite differences."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.config.loss_facts import LOSS_FACTS, LossName
from dpo.model.log_probs import Head, completion_log_probs
from dpo.step.losses import LOSSES, PairTerms, completion_rewards, sft_losses, total_losses
from tests.support.pair_losses import doubles, losses_of

WINNERS, LOSERS = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
PREFERENCES = ["dpo", "ipo", "hinge", "robust", "apo_zero", "apo_down", "dpop"]
OF_THE_MARGIN = PREFERENCES[:4]


def losses_at(*h: float, **config: Any) -> list[float]:
    """The loss of pairs with these h, their reference at 0 and every completion of one token."""
    zeros = torch.zeros(2 * len(h), dtype=torch.float64)
    pi_logps = torch.cat([doubles(*h), zeros[len(h) :]])
    winners = torch.arange(len(h))
    lengths = torch.ones_like(zeros)
    return losses_of(pi_logps, zeros, lengths, winners, winners + len(h), LossConfig(**config)).tolist()


# --- published metrics -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "published" / "published_figures.json").read_text())


@pytest.mark.parametrize(("name", "key"), [("dpo", "expected_losses"), ("hinge", "expected_hinge_losses_gamma0.1")])
def test_torchtune(published: dict[str, Any], name: str, key: str) -> None:
    case = published["torchtune_dpo"]
    pi_logps = torch.tensor(case["policy_chosen"] + case["policy_rejected"])
    ref_logps = torch.tensor(case["ref_chosen"] + case["ref_rejected"])
    config = LossConfig(name=name, beta=case["beta"])
    losses = losses_of(pi_logps, ref_logps, torch.ones(6), WINNERS, LOSERS, config)
    torch.testing.assert_close(losses, torch.tensor(case[key]), **case["tolerance"])


@pytest.mark.parametrize(("smoothing", "key"), [(0.0, "0"), (0.3, "0.3")])
def test_tunix(published: dict[str, Any], smoothing: float, key: str) -> None:
    case = published["tunix_dpo"]
    pi_logps = torch.tensor(case["per_token_logps"]).sum(-1)
    ref_logps = torch.tensor(case["ref_chosen"] + case["ref_rejected"])
    winners, config = torch.arange(4), LossConfig(beta=case["beta"], label_smoothing=smoothing)
    losses = losses_of(pi_logps, ref_logps, torch.ones(8), winners, winners + 4, config)
    wanted = case[f"expected_mean_loss_label_smoothing_{key}"]
    assert losses.mean().item() == pytest.approx(wanted, abs=case["tolerance"]["atol"])


def test_maxtext(published: dict[str, Any]) -> None:
    """Margins there have beta in them already: h = margin / beta."""
    for margin, loss in published["maxtext_margin_to_loss"]["pairs"]:
        assert losses_at(margin / 0.1, beta=0.1) == [pytest.approx(loss, abs=1e-6)]


def test_open_instruct_a_completion_without_tokens_is_0_not_nan(published: dict[str, Any]) -> None:
    """Their fully masked row. Log-probabilities -1, -2, -3 come from a head of two tokens: with hidden state x, weight
    rows 1 and 0 and target 0, log p = -log(1 + e^-x), which is -v where x = -log(e^v - 1). Their mean over the row is
    -2.
    """
    case = published["open_instruct_average_log_prob"]["cases"][0]
    values = [-v for v in case["per_token_logps"][0][:3]]
    hidden = doubles(*(-math.log(math.expm1(v)) for v in values))[:, None]
    lengths = torch.tensor([3, 0])
    logps = completion_log_probs(
        hidden, Head(doubles(1, 0)[:, None], None, 1), torch.zeros(3, dtype=torch.long), lengths
    )
    assert (logps / lengths.clamp(min=1)).tolist() == [pytest.approx(v) for v in case["expected"]]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_dpo_by_hand() -> None:
    """beta 1/2, h = 2 ln 3: -log sigmoid(ln 3) = ln(1 + 1/3) = ln 4/3. With h of the other sign ln(1 + 3) = ln 4. Label
    smoothing 1/4 takes 3/4 of one and 1/4 of the other.
    """
    h = 2 * math.log(3)
    assert losses_at(h, -h, beta=0.5) == [pytest.approx(math.log(4 / 3)), pytest.approx(math.log(4))]
    smoothed = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert losses_at(h, beta=0.5, label_smoothing=0.25) == [pytest.approx(smoothed)]


def test_robust_by_hand() -> None:
    """beta 1/2, h = 2 ln 3, eps 1/4: (3/4 ln 4/3 - 1/4 ln 4) / (1/2) = 3/2 ln 4/3 - 1/2 ln 4. Without eps it is DPO."""
    h = 2 * math.log(3)
    robust = 1.5 * math.log(4 / 3) - 0.5 * math.log(4)
    assert losses_at(h, name="robust", beta=0.5, label_smoothing=0.25) == [pytest.approx(robust)]
    assert losses_at(h, name="robust", beta=0.5) == [pytest.approx(math.log(4 / 3))]


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """Chowdhury et al., lemma 3.1: with labels flipped at rate eps, its expectation is the loss of the true label."""
    for h in (-3.0, 0.4, 7.0):
        true, flipped = losses_at(h, -h, name="robust", beta=0.3, label_smoothing=0.2)
        assert 0.8 * true + 0.2 * flipped == pytest.approx(losses_at(h, beta=0.3)[0])


def test_ipo_by_hand() -> None:
    """beta 1/4: the target is 1/(2 beta) = 2; h = 5 is 3 from it, h = -1 also, h = 2 is there."""
    assert losses_at(5, -1, 2, name="ipo", beta=0.25) == [9, 9, 0]


def test_hinge_by_hand() -> None:
    """beta 1/2: 1 - h/2, not below 0."""
    assert losses_at(1, 3, -2, name="hinge", beta=0.5) == [0.5, 0, 2]


def test_h_is_the_difference_of_log_ratios() -> None:
    """Completions 0, 1, 2 with pi - ref = -1 - -3 = 2, -2 - -1 = -1, -5 - -9 = 4; pairs (0, 1), (2, 0), (2, 1) and
    (0, 1) again: h = 3, 2, 5, 3, which IPO at beta 1/2 makes (h - 1)^2 = 4, 1, 16, 4.
    """
    pi_logps, ref_logps = doubles(-1, -2, -5), doubles(-3, -1, -9)
    winners, losers = torch.tensor([0, 2, 2, 0]), torch.tensor([1, 0, 1, 1])
    config = LossConfig(name="ipo", beta=0.5)
    losses = losses_of(pi_logps, ref_logps, torch.ones(3), winners, losers, config)
    assert losses.tolist() == [4, 1, 16, 4]


@pytest.mark.parametrize("name", OF_THE_MARGIN)
def test_length_normalized_by_hand(name: str) -> None:
    """Winner 6 nats over its reference in 3 tokens, loser 8 in 4: h = 6/3 - (-8)/4 = 4 nats a token, not 14."""
    config = LossConfig(name=name, beta=0.3, length_normalized=True)
    lengths = torch.tensor([3, 4])
    losses = losses_of(doubles(-10, -30), doubles(-16, -22), lengths, torch.tensor([0]), torch.tensor([1]), config)
    assert losses.tolist() == pytest.approx(losses_at(4, name=name, beta=0.3))


def test_sft_by_hand() -> None:
    """Three pairs, winners 0, 1 and 0 again with log-probabilities -6 and -4 of 3 and 1 tokens, so 3 + 1 + 3 = 7 in the
    step: (6 + 4 + 6) / 7 nats a token is the mean over the step's pairs.
    """
    losses = sft_losses(doubles(-6, -4, -99), torch.tensor([0, 1, 0]), 3, 7)
    assert losses.mean().item() == pytest.approx(16 / 7)


def test_totals_by_hand() -> None:
    """`sft` is the term alone, `sft_weight` 0.5 adds half of it, 0 leaves it out even where it is infinite."""
    preference, sft = doubles(1, 2), doubles(4, 8)
    assert total_losses(doubles(0, 0), sft, LossConfig(name="sft")).tolist() == [4, 8]
    assert total_losses(preference, sft, LossConfig(sft_weight=0.5)).tolist() == [3, 6]
    assert total_losses(preference, sft / 0, LossConfig()).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("names", "rewards"),
    [(PREFERENCES, [0.2, -0.1, 0.4]), (["simpo", "orpo"], [-0.1, -0.1, -0.1]), (["sft"], None)],
)
def test_rewards_by_hand(names: list[Any], rewards: list[float] | None) -> None:
    """0.1 (pi - ref), or 0.1 pi / n for 1, 2 and 5 tokens, without a gradient."""
    pi_logps = doubles(-1, -2, -5).requires_grad_()
    none = torch.tensor([], dtype=torch.long)
    terms = PairTerms(pi_logps - doubles(-3, -1, -9), pi_logps, torch.tensor([1, 2, 5]), none, none)
    for name in names:
        found = completion_rewards(terms, LossConfig(name))
        assert (None if found is None else found.tolist()) == (None if rewards is None else pytest.approx(rewards))
        assert found is None or not found.requires_grad


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LossConfig(), math.log(2)),
        (LossConfig(label_smoothing=0.3), math.log(2)),
        (LossConfig(name="robust", label_smoothing=0.3), math.log(2)),
        (LossConfig(name="ipo", beta=0.2), 1 / (4 * 0.04)),
        (LossConfig(name="hinge"), 1.0),
        (LossConfig(name="apo_zero", length_normalized=True), 1.0),
        (LossConfig(name="apo_down"), 1.0),
        (LossConfig(name="dpop", dpop_lambda=7.0), math.log(2)),
    ],
)
def test_loss_of_an_indifferent_policy(config: LossConfig, expected: float) -> None:
    """h = 0: ln 2 for dpo with any smoothing, and for robust: (1 - 2 eps) ln 2 / (1 - 2 eps); 1 / (4 beta^2); 1.
    apo_zero: 1 - 1/2 + 1/2, apo_down: 1/2 + 1 - 1/2; dpop: no penalty, hence ln 2.
    """
    logps = doubles(-1, -2, -3, -4, -5, -6)
    found = losses_of(logps, logps, torch.ones_like(logps), WINNERS, LOSERS, config)
    assert found.tolist() == pytest.approx([expected] * 3)
    at_zero = LOSSES[config.name].at_zero
    assert at_zero is not None and at_zero(config) == pytest.approx(expected)


# --- gradients and extremes ------------------------------------------------------------------------------------------


def loss_function(config: LossConfig, ref_logps: Tensor, lengths: Tensor) -> Callable[[Tensor], Tensor]:
    """pi_logps (6,) -> total losses (4,), a winner and a loser standing in two pairs each."""
    winners, losers = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 4, 5, 4])

    def losses(pi_logps: Tensor) -> Tensor:
        preference = losses_of(pi_logps, ref_logps, lengths, winners, losers, config)
        return total_losses(preference, sft_losses(pi_logps, winners, 4, 30), config)

    return losses


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("name", PREFERENCES)
def test_gradients_by_finite_differences(name: str, length_normalized: bool, sft_weight: float) -> None:
    smoothing = 0.2 if name in ("dpo", "robust") else 0.0
    config = LossConfig(name, 0.3, smoothing, length_normalized, sft_weight)
    torch.manual_seed(0)
    pi_logps, ref_logps = torch.randn(2, 6, dtype=torch.float64) * 3
    losses = loss_function(config, ref_logps, torch.tensor([3, 9, 4, 5, 1, 7]))
    assert torch.autograd.gradcheck(losses, pi_logps.requires_grad_())


def test_dpo_gradient_by_hand() -> None:
    """Of -log sigmoid(beta h): -beta sigmoid(-beta h) for the winner, + for the loser. beta 1/2, h = 2 ln 3: 1/8."""
    pi_logps = doubles(2 * math.log(3), 0).requires_grad_()
    zeros, first, second = torch.zeros(2, dtype=torch.float64), torch.tensor([0]), torch.tensor([1])
    losses = losses_of(pi_logps, zeros, zeros + 1, first, second, LossConfig(beta=0.5))
    losses.sum().backward()
    assert pi_logps.grad.tolist() == pytest.approx([-1 / 8, 1 / 8])


@pytest.mark.parametrize("h", [-1e4, 1e4])
@pytest.mark.parametrize("name", PREFERENCES)
def test_extreme_margins_stay_finite(name: str, h: float) -> None:
    """In float32, with their gradients. At beta 1/2 DPO gives 0 for h = 1e4 and 5,000 for -1e4, where exp overflows."""
    pi_logps = torch.tensor([h, 0.0]).requires_grad_()
    config = LossConfig(name=name, beta=0.5, label_smoothing=0.1 if name == "robust" else 0.0)
    losses = losses_of(pi_logps, torch.zeros(2), torch.ones(2), torch.tensor([0]), torch.tensor([1]), config)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert pi_logps.grad.isfinite().all()
    if name == "dpo":
        assert losses.item() == pytest.approx(max(-0.5 * h, 0))


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_name_of_a_loss_has_facts_and_a_function() -> None:
    """The choices of `loss.name`, the facts in config and the functions here, in one order."""
    assert get_args(get_type_hints(LossConfig)["name"]) == get_args(LossName)
    assert list(get_args(LossName)) == list(LOSS_FACTS) == list(LOSSES)


@pytest.mark.parametrize("name", LOSS_FACTS)
def test_the_facts_are_those_of_the_function(name: LossName) -> None:
    """A log-ratio of -1 or -1.5 against 2: what a loss reads changes it, and nothing else does. Without a reference
    there are no log-ratios, hence no value at 0.
    """
    facts, entry = LOSS_FACTS[name], LOSSES[name]
    first, second = torch.tensor([0]), torch.tensor([1])

    def loss(log_ratio: float, margin: float | None = None, **changes: Any) -> float:
        config = LossConfig(name=name, beta=0.5, **changes)
        margins = None if margin is None else doubles(margin)
        terms = PairTerms(doubles(log_ratio, 2), doubles(-7, -9), torch.tensor([2, 3]), first, second, margins=margins)
        return entry.losses(terms, config).item()

    assert (loss(-1.0) != loss(-1.5)) == facts.uses_reference
    assert (loss(-1.0) != loss(-1.0, label_smoothing=0.2)) == facts.smooths
    assert (loss(-1.0) != loss(-1.0, margin=0.3)) == facts.offsets
    for key in ("gamma", "dpop_lambda"):
        assert (loss(-1.0) != loss(-1.0, **{key: 3.0})) == (facts.own_key == key)
    assert facts.uses_reference or facts.rewards != "implicit"
    assert (entry.at_zero is not None) == facts.uses_reference


def test_sft_is_the_sft_term_alone() -> None:
    """No preference loss, and no gradient of one."""
    pi_logps = doubles(-1, -2).requires_grad_()
    losses = losses_of(pi_logps, None, torch.ones(2), torch.tensor([0]), torch.tensor([1]), LossConfig("sft"))
    assert losses.tolist() == [0] and not losses.requires_grad


def test_log_ratios_without_a_reference_are_no_numbers() -> None:
    """A loss that reads a reference that it was not given does not get 0 for it."""
    losses = losses_of(doubles(-1, -2), None, torch.ones(2), WINNERS[:1], LOSERS[:1] - 2, LossConfig())
    assert losses.isnan().all()
