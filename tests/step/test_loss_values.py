"""APO, DPO-Positive, SimPO, ORPO and DPO with margins against hand-derived numbers, and at their extremes in float32.

Throughout sigmoid(ln 3) = 3/4 and sigmoid(ln 7) = 7/8.
"""

import math
from typing import Any

import pytest
import torch

from dpo.config import LossConfig
from dpo.config.loss_facts import LOSS_FACTS
from dpo.step.losses import PairTerms, log_odds, preference_losses, sft_losses, total_losses
from tests.support.pair_losses import doubles, losses_of, losses_of_pairs

LN2, LN3, LN7 = math.log(2), math.log(3), math.log(7)
FIRST, SECOND = torch.tensor([0]), torch.tensor([1])

# --- by hand ---------------------------------------------------------------------------------------------------------


def test_apo_zero_by_hand() -> None:
    """beta 1/2. Log-ratios 2 ln 3 and -2 ln 7: u = ln 3 and -ln 7, 1 - 3/4 + 1/8 = 3/8. Winner and loser exchanged: 1 -
    1/8 + 3/4 = 13/8. Both at the reference: 1.
    """
    policy = ([2 * LN3 - 5, -2 * LN7 - 5, -5.0], [-2 * LN7 - 9, 2 * LN3 - 9, -9.0])
    losses = losses_of_pairs(policy, LossConfig("apo_zero", 0.5), ([-5.0] * 3, [-9.0] * 3))
    assert losses == pytest.approx([3 / 8, 13 / 8, 1])


def test_apo_down_by_hand() -> None:
    """beta 1/2. Log-ratios 2 ln 3 and 2 ln 3 - 2 ln 7: 3/4 + 1 - sigmoid(ln 7) = 7/8. Exchanged: u_w = ln(3/7), so
    3/10 + 1 - 1/8 = 47/40. Both at the reference: 1.
    """
    policy = ([2 * LN3, 2 * LN3 - 2 * LN7, 0.0], [2 * LN3 - 2 * LN7, 2 * LN3, 0.0])
    losses = losses_of_pairs(policy, LossConfig("apo_down", 0.5), ([0.0] * 3, [0.0] * 3))
    assert losses == pytest.approx([7 / 8, 47 / 40, 1])


@pytest.mark.parametrize("name", ["apo_zero", "apo_down"])
def test_apo_of_length_normalized_log_ratios(name: Any) -> None:
    """Log-ratios of 6 nats in 3 tokens and -8 in 4 are those of 2 and -2 nats in one."""
    normalized = LossConfig(name, 0.3, length_normalized=True)
    whole = losses_of_pairs(([6.0], [-8.0]), normalized, ([0.0], [0.0]), ([3], [4]))
    assert whole == pytest.approx(losses_of_pairs(([2.0], [-2.0]), LossConfig(name, 0.3), ([0.0], [0.0])))


def test_dpop_by_hand() -> None:
    """beta 1/2, lambda 3. The winner above its reference: h = 2 ln 3, no penalty, ln 4/3. The winner at -2 ln 3, the
    loser at -10 ln 3: h = 8 ln 3 less 3 * 2 ln 3, again 2 ln 3. With lambda 5 h - 10 ln 3 = -2 ln 3: ln 4.
    """
    policy, reference = ([2 * LN3, -2 * LN3], [0.0, -10 * LN3]), ([0.0, 0.0], [0.0, 0.0])
    losses = losses_of_pairs(policy, LossConfig("dpop", 0.5, dpop_lambda=3.0), reference)
    assert losses == pytest.approx([math.log(4 / 3)] * 2)
    stricter = losses_of_pairs(policy, LossConfig("dpop", 0.5, dpop_lambda=5.0), reference)
    assert stricter == pytest.approx([math.log(4 / 3), math.log(4)])


def test_dpop_without_its_penalty_is_dpo() -> None:
    policy, reference = ([-3.0, 2.0], [-1.0, 0.5]), ([0.0, 0.0], [0.0, 0.0])
    losses = losses_of_pairs(policy, LossConfig("dpop", 0.3, dpop_lambda=0.0), reference)
    assert losses == pytest.approx(losses_of_pairs(policy, LossConfig("dpo", 0.3), reference))
    assert LossConfig().dpop_lambda == 50  # Pal et al. 2024, section 5


def test_simpo_by_hand() -> None:
    """beta 2, gamma ln 3. Winner -6 nats in 3 tokens, loser -4 ln 3 - 8 in 4: -2 against -ln 3 - 2 a token, 2 ln 3 -
    ln 3 = ln 3: ln 4/3. Equally likely per token, -6 in 3 and -8 in 4: log(1 + exp gamma) = ln 4, the value at start.
    """
    policy = ([-6.0, -6.0], [-4 * LN3 - 8, -8.0])
    losses = losses_of_pairs(policy, LossConfig("simpo", 2.0, gamma=LN3), lengths=([3, 3], [4, 4]))
    assert losses == pytest.approx([math.log(4 / 3), math.log(4)])


def test_orpo_by_hand() -> None:
    """beta 1/2. Mean probabilities 3/4 and 1/2, odds 3 and 1: -1/2 log sigmoid(ln 3) = 1/2 ln 4/3. Exchanged 1/2 ln 4.
    Equally likely per token: 1/2 ln 2. Two and five tokens.
    """
    high, half = math.log(3 / 4), -LN2
    policy = ([2 * high, 2 * half, 2 * half], [5 * half, 5 * high, 5 * half])
    losses = losses_of_pairs(policy, LossConfig("orpo", 0.5), lengths=([2] * 3, [5] * 3))
    assert losses == pytest.approx([0.5 * math.log(4 / 3), 0.5 * math.log(4), 0.5 * LN2])


def test_orpo_includes_the_sft_term() -> None:
    """Two pairs whose winners have -6 and -4 nats in 3 and 1 tokens: the mean over pairs of the SFT term is 10/4, and
    with weight 1 it is in the total, whatever `sft_weight` says.
    """
    pi_logps, lengths = doubles(-6, -4, -6, -4), torch.tensor([3, 1, 3, 1])
    winners, losers, config = torch.tensor([0, 1]), torch.tensor([2, 3]), LossConfig("orpo", 0.5)
    preference = losses_of(pi_logps, None, lengths, winners, losers, config)
    total = total_losses(preference, sft_losses(pi_logps, winners, 2, 4), config)
    assert total.mean().item() == pytest.approx(0.5 * LN2 + 10 / 4)


def test_margins_by_hand() -> None:
    """beta 1/2, h = 2 ln 7 twice and 0, margins ln 7 - ln 3, 0 and -ln 3: ln 3, ln 7, ln 3: ln 4/3, ln 8/7, ln 4/3.
    With a quarter of the labels flipped, 3/4 ln 4/3 + 1/4 ln 4.
    """
    log_ratios = doubles(2 * LN7, 2 * LN7, 0, 0, 0, 0)
    winners = torch.tensor([0, 1, 2])
    terms = PairTerms(log_ratios, log_ratios, torch.ones(6), winners, winners + 3, doubles(LN7 - LN3, 0, -LN3))
    losses = preference_losses(terms, LossConfig(beta=0.5)).tolist()
    assert losses == pytest.approx([math.log(4 / 3), math.log(8 / 7), math.log(4 / 3)])
    smoothed = preference_losses(terms, LossConfig(beta=0.5, label_smoothing=0.25)).tolist()
    assert smoothed[0] == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    with pytest.raises(AssertionError, match="ipo"):
        preference_losses(terms, LossConfig("ipo"))


# --- gradients and extremes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "beta"), [("simpo", 2.0), ("orpo", 0.5)])
def test_gradients_by_finite_differences(name: Any, beta: float) -> None:
    """A winner and a loser stand in two pairs each; the SFT term is part of the total."""
    winners, losers, lengths = torch.tensor([0, 1, 0]), torch.tensor([2, 2, 1]), torch.tensor([3, 9, 4])
    config = LossConfig(name, beta, sft_weight=0.7 if name == "simpo" else 0.0)

    def totals(pi_logps: torch.Tensor) -> torch.Tensor:
        preference = losses_of(pi_logps, None, lengths, winners, losers, config)
        return total_losses(preference, sft_losses(pi_logps, winners, 3, 15), config)

    assert torch.autograd.gradcheck(totals, doubles(-2.5, -9.5, -0.4).requires_grad_())


@pytest.mark.parametrize(
    ("config", "logps", "lengths", "gradient"),
    [
        (LossConfig("apo_zero", 0.5), (2 * LN3, -2 * LN7), (1, 1), (-3 / 32, 7 / 128)),
        (LossConfig("apo_down", 0.5), (2 * LN3, 2 * LN3 - 2 * LN7), (1, 1), (3 / 32 - 7 / 128, 7 / 128)),
        (LossConfig("dpop", 0.5, dpop_lambda=3.0), (-2 * LN3, -6 * LN3), (1, 1), (-3 / 2, 3 / 8)),
        (LossConfig("simpo", 2.0, gamma=0.0), (LN3 - 8, -16), (2, 4), (-1 / 4, 1 / 8)),
        (LossConfig("orpo", 1.0), (math.log(3 / 4), -LN2), (1, 1), (-1, 1 / 2)),
    ],
    ids=lambda value: value.name if isinstance(value, LossConfig) else "",
)
def test_gradients_by_hand(
    config: LossConfig, logps: tuple[float, float], lengths: tuple[int, int], gradient: tuple[float, float]
) -> None:
    """beta 1/2. apo: sigmoid' is 3/16 at ln 3 and 7/64 at ln 7 and -ln 7. dpop: h - 3 * 2 ln 3 = -2 ln 3, so -(3/4)
    (1/2)(1 + 3) and (3/4)(1/2). simpo, beta 2: beta times the difference is ln 3, so -(1/4) 2/n. orpo, beta 1, odds 3
    and 1: -(1/4) / (1 - 3/4) and (1/4) / (1 - 1/2).
    """
    pi_logps = doubles(*logps).requires_grad_()
    reference = torch.zeros(2, dtype=torch.float64) if config.facts.uses_reference else None
    losses_of(pi_logps, reference, torch.tensor(lengths), FIRST, SECOND, config).sum().backward()
    assert pi_logps.grad.tolist() == pytest.approx(gradient)


@pytest.mark.parametrize("logps", [(-1e4, 1e4), (1e4, -1e4)])
@pytest.mark.parametrize("name", ["apo_zero", "apo_down", "dpop", "simpo", "orpo"])
def test_extremes_stay_finite(name: Any, logps: tuple[float, float]) -> None:
    """In float32, with their gradients: at log-probabilities of -1e4 and, beyond what can be, of 1e4."""
    pi_logps = torch.tensor(logps).requires_grad_()
    reference = torch.zeros(2) if LossConfig(name).facts.uses_reference else None
    losses = losses_of(pi_logps, reference, torch.ones(2), FIRST, SECOND, LossConfig(name, 0.5))
    losses.sum().backward()
    assert losses.isfinite().all() and pi_logps.grad.isfinite().all()


def test_log_odds_by_hand() -> None:
    """Odds 3, 1 and 1/7. In float32 as well where 1 - p would be 0: at log p = -1e-6 the odds are 1e6 to a part in a
    million, where log(1 - exp(log p)) is 5 % off. At -1e4 they are log p.
    """
    found = log_odds(doubles(math.log(3 / 4), -LN2, -math.log(8)))
    assert found.tolist() == pytest.approx([LN3, 0, -LN7], abs=1e-15)
    means = torch.tensor([-1e-6, -1e4])
    assert log_odds(means).tolist() == pytest.approx([math.log(1e6), -1e4], rel=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1e-7, -1e-9, -torch.finfo(torch.float32).eps, -1e-6, -80.0, -1e30])
def test_log_odds_are_finite_in_float32(mean: float) -> None:
    """At p = 1 too, and where rounding makes a log-probability positive; the gradient is at most 1/eps."""
    means = torch.tensor([mean]).requires_grad_()
    odds = log_odds(means)
    odds.sum().backward()
    assert odds.isfinite().all() and odds <= -math.log(torch.finfo(torch.float32).eps) * (1 + 1e-6)
    assert 0 <= means.grad.item() <= 1.01 / torch.finfo(torch.float32).eps


# --- the probability that a loss fits ---------------------------------------------------------------------------------


def fitted_probability(config: LossConfig, share: float, margin: float = 0.0) -> float:
    """sigmoid(beta h) of the h, among beta h = -6, -5.99, ... 6, whose mean loss is least over labels of which `share`
    name the first answer; the log-ratios of the answers are h/2 and -h/2.
    """
    scaled = torch.arange(-600, 601, dtype=torch.float64) / 100
    ratios = torch.cat([scaled, -scaled]) / (2 * config.beta)
    first, second = torch.arange(len(scaled)), torch.arange(len(scaled)) + len(scaled)
    margins = torch.full_like(scaled, margin) if config.facts.offsets else None

    def losses(winners: torch.Tensor, losers: torch.Tensor) -> torch.Tensor:
        terms = PairTerms(ratios, ratios - 50, torch.ones_like(first).repeat(2), winners, losers, margins)
        return preference_losses(terms, config)

    mean = share * losses(first, second) + (1 - share) * losses(second, first)
    return float(torch.sigmoid(scaled[mean.argmin()]))


SHARES = (0.6, 0.75, 0.9)


@pytest.mark.parametrize("name", [name for name, facts in LOSS_FACTS.items() if facts.rewards == "implicit"])
def test_losses_of_bradley_and_terry_fit_the_share_of_labels(name: Any) -> None:
    """Their optimum is at sigmoid(beta h) = share, within half a step of 0.01 in beta h, 0.00125 at most; that of the
    other losses is elsewhere: of ipo at beta h = share - 1/2, of hinge at 1, of apo_zero as far as it goes.
    """
    away = max(abs(fitted_probability(LossConfig(name, 0.1), share) - share) for share in SHARES)
    assert (away < 0.0013) == LOSS_FACTS[name].is_bradley_terry
    assert LOSS_FACTS[name].is_bradley_terry or away > 0.05


@pytest.mark.parametrize("name", ["dpo", "robust"])
def test_smoothed_labels_and_margins_move_the_optimum(name: Any) -> None:
    """dpo smoothed by 0.1 fits 0.9 share + 0.1 (1 - share), robust (share - 0.1) / 0.8; a margin of 1 is added."""
    expected = {"dpo": 0.9 * 0.75 + 0.1 * 0.25, "robust": (0.75 - 0.1) / 0.8}[name]
    assert fitted_probability(LossConfig(name, label_smoothing=0.1), 0.75) == pytest.approx(expected, abs=0.0013)
    if name == "dpo":  # the margin is that of the pair's winner, whichever it is: 0 fits an even share alone
        assert abs(fitted_probability(LossConfig(name), 0.75, margin=1.0) - 0.75) > 0.05
