"""The losses of preference pairs, on the paper's index signature.

Throughout, T pairs stand among B completions; `pi_logps` and `ref_logps` (B,) are log-probabilities of whole
completions given their prompts in nats; `lengths` (B,) counts their scored tokens, EOS included; `yw_idxs` and
`yl_idxs` (T,) index winners and losers. The losses are functions of one or two of

    log_ratios = pi_logps - ref_logps                     (B,) nats; divided by lengths if `loss.length_normalized`
    h          = log_ratios[yw_idxs] - log_ratios[yl_idxs]      (T,)
    u          = beta log_ratios                          (B,)
    means      = pi_logps / lengths                       (B,) nats per token

Every loss returns (T,), one value per pair, never averaged: a step divides their sum by its global number of pairs.
`LOSSES` has one entry per `loss.name`; `dpo/config/loss_facts.py` has the facts that config needs of it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.config import LossConfig
from dpo.config.loss_facts import LossName


@dataclass(frozen=True)
class PairTerms:
    """The terms from which the losses of T pairs among B completions are computed."""

    log_ratios: Tensor
    """(B,) pi_logp - ref_logp, nats, from `log_ratios`; NaN where the loss uses no reference."""
    pi_logps: Tensor
    """(B,) nats under the policy."""
    lengths: Tensor
    """(B,) integers: scored tokens of each completion, EOS included."""
    yw_idxs: Tensor
    """(T,) int64: the winner of each pair, an index of the B completions."""
    yl_idxs: Tensor
    """(T,) int64: the loser of each pair, likewise."""
    margins: Tensor | None = None
    """(T,) the margin of each pair, on the scale of beta h; None: all 0."""

    @property
    def h(self) -> Tensor:
        """Returns the difference of the log-ratios of winner and loser, (T,)."""
        return self.log_ratios[self.yw_idxs] - self.log_ratios[self.yl_idxs]


def log_ratios(pi_logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """Returns pi_logps - ref_logps, (B,) nats, with gradient; NaN without a reference, so that a loss that reads them
    all the same is not computed against a reference of log-probability 0.
    """
    return torch.full_like(pi_logps, math.nan) if ref_logps is None else pi_logps - ref_logps


# --- with a reference ------------------------------------------------------------------------------------------------


def dpo_loss(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns -(1 - eps) log sigmoid(beta h - m) - eps log sigmoid(-(beta h - m)), (T,), with eps = label_smoothing and
    m the margins of the pairs.

    Equation 7 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; eps > 0 is conservative DPO (the probability
    that a label is wrong), equation 3 of https://ericmitchell.ai/cdpo.pdf; m is the offset of ODPO, Amini et al. 2024,
    https://arxiv.org/abs/2402.10571.
    """
    eps = config.label_smoothing
    scaled = config.beta * terms.h if terms.margins is None else config.beta * terms.h - terms.margins
    return -(1 - eps) * F.logsigmoid(scaled) - eps * F.logsigmoid(-scaled)


def ipo_loss(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns (h - 1/(2 beta))^2, (T,): equation 17 of Azar et al. 2023, https://arxiv.org/abs/2310.12036 (beta is
    their tau).
    """
    return (terms.h - 1 / (2 * config.beta)) ** 2


def hinge_loss(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns max(0, 1 - beta h), (T,): SLiC's hinge on DPO's margin, Liu et al. 2023,
    https://arxiv.org/abs/2309.06657.
    """
    return torch.relu(1 - config.beta * terms.h)


def robust_loss(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns [(1 - eps)(-log sigmoid(beta h)) - eps (-log sigmoid(-beta h))] / (1 - 2 eps), (T,), eps < 1/2.

    Equation 12 of Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409: unbiased when a share eps of labels is
    flipped.
    """
    eps, scaled = config.label_smoothing, config.beta * terms.h
    return (-(1 - eps) * F.logsigmoid(scaled) + eps * F.logsigmoid(-scaled)) / (1 - 2 * eps)


def apo_zero_loss(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns 1 - sigmoid(u_w) + sigmoid(u_l), (T,): raises winners and lowers losers, each against the reference.

    Equation 7 of D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, plus 1. 1 - sigmoid(u) is sigmoid(-u).
    """
    u = config.beta * terms.log_ratios
    return torch.sigmoid(-u[terms.yw_idxs]) + torch.sigmoid(u[terms.yl_idxs])


def apo_down_loss(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns sigmoid(u_w) + 1 - sigmoid(u_w - u_l), (T,): lowers winners, and losers further, for a policy that is
    better than its winners.

    Equation 8 of D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, plus 1. 1 - sigmoid(x) is sigmoid(-x).
    """
    u = config.beta * terms.log_ratios
    return torch.sigmoid(u[terms.yw_idxs]) + torch.sigmoid(-config.beta * terms.h)


def dpop_loss(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns -log sigmoid(beta (h - lambda max(0, -log_ratio_w))), (T,), with lambda = dpop_lambda: DPO that penalizes
    winners below the reference.

    Equation 3 of Pal et al. 2024, https://arxiv.org/abs/2402.13228; section 5 has lambda = 50. The penalty has a kink
    at a log-ratio of 0, where a policy starts that is its own reference: rounding decides the side at step 1.
    """
    penalty = torch.relu(-terms.log_ratios[terms.yw_idxs])
    return -F.logsigmoid(config.beta * (terms.h - config.dpop_lambda * penalty))


# --- without a reference ---------------------------------------------------------------------------------------------


def simpo_loss(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns -log sigmoid(beta (means_w - means_l) - gamma), (T,): equation 6 of Meng et al. 2024,
    https://arxiv.org/abs/2405.14734.

    Where winner and loser are equally likely per token it is log(1 + exp(gamma)).
    """
    means = terms.pi_logps / terms.lengths
    return -F.logsigmoid(config.beta * (means[terms.yw_idxs] - means[terms.yl_idxs]) - config.gamma)


def orpo_loss(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns -beta log sigmoid(o_w - o_l), (T,), with o the log odds of a completion by its mean log-probability.

    Equations 4, 6 and 7 of Hong et al. 2024, https://arxiv.org/abs/2403.07691, whose lambda is beta, without the SFT
    term, which `total_losses` adds. Where winner and loser are equally likely per token it is beta log 2.
    """
    odds = log_odds(terms.pi_logps / terms.lengths)
    return -config.beta * F.logsigmoid(odds[terms.yw_idxs] - odds[terms.yl_idxs])


def log_odds(means: Tensor) -> Tensor:
    """Returns log p - log(1 - p), (B,), with log p = means.

    1 - p is -expm1(log p), which keeps its digits where p is near 1. A mean nearer to 0 than the dtype resolves beside
    1 counts as that distance, so that value and gradient are finite.
    """
    bounded = means.clamp(max=-torch.finfo(means.dtype).eps)
    return bounded - torch.log(-torch.expm1(bounded))


def no_losses(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns zeros (T,): `sft` is the SFT term and nothing else."""
    return torch.zeros_like(terms.pi_logps[terms.yw_idxs])


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """An entry of `LOSSES`."""

    losses: Callable[[PairTerms, LossConfig], Tensor]
    """Terms, whose log-ratios are divided by lengths if `loss.length_normalized` -> losses (T,)."""
    at_zero: Callable[[LossConfig], float] | None
    """The loss of a pair whose log-ratios and margin are 0, derived by hand: the check of the first step compares
    `losses` with it. None where the loss uses no reference."""


LOSSES: Mapping[LossName, Loss] = {
    "dpo": Loss(dpo_loss, at_zero=lambda config: math.log(2)),
    "ipo": Loss(ipo_loss, at_zero=lambda config: 1 / (4 * config.beta**2)),
    "hinge": Loss(hinge_loss, at_zero=lambda config: 1.0),
    "robust": Loss(robust_loss, at_zero=lambda config: math.log(2)),
    "apo_zero": Loss(apo_zero_loss, at_zero=lambda config: 1.0),
    "apo_down": Loss(apo_down_loss, at_zero=lambda config: 1.0),
    "dpop": Loss(dpop_loss, at_zero=lambda config: math.log(2)),
    "simpo": Loss(simpo_loss, at_zero=None),
    "orpo": Loss(orpo_loss, at_zero=None),
    "sft": Loss(no_losses, at_zero=None),
}
"""The losses by `loss.name`."""


# --- from log-probabilities to minimized losses ----------------------------------------------------------------------


def preference_losses(terms: PairTerms, config: LossConfig) -> Tensor:
    """Returns the configured preference loss of each pair, (T,), not averaged, with gradient.

    Args:
        terms: the terms of the pairs, in the dtype of `pi_logps`; margins only for a loss that takes them.
        config: `length_normalized` divides the log-ratio of each completion by its length, which makes h nats per
            token: section 5.1.2 of Lambert et al. 2024, https://arxiv.org/abs/2411.15124.
    """
    assert terms.margins is None or config.facts.offsets, config.name
    if config.length_normalized:
        terms = replace(terms, log_ratios=terms.log_ratios / terms.lengths)
    return LOSSES[config.name].losses(terms, config)


def sft_losses(pi_logps: Tensor, yw_idxs: Tensor, pairs_in_step: int, winner_tokens_in_step: int) -> Tensor:
    """Returns each pair's share of the SFT term, (T,): -pi_logps[w] * pairs_in_step / winner_tokens_in_step.

    Scaled so that the *mean over the step's pairs* is sum(-pi_logps[w]) / sum(len(w)), the negative log-likelihood of
    the winners in nats per token, both sums over the whole step; a winner in three pairs counts three times.
    Used beside a preference loss in Pang et al. 2024 (RPO), https://arxiv.org/abs/2404.19733.

    Args:
        pi_logps: (B,) nats under the policy.
        yw_idxs: (T,) int64: the winner of each pair, an index of the B completions.
        pairs_in_step: number of pairs of the whole step, all ranks and micro-batches.
        winner_tokens_in_step: scored tokens of the winners of all these pairs, once per pair; 0, in a step without
            pairs, counts as 1.

    Returns:
        (T,) nats, scaled as above, with gradient.
    """
    return -pi_logps[yw_idxs] * (pairs_in_step / max(winner_tokens_in_step, 1))


def total_losses(preference: Tensor, sft: Tensor, config: LossConfig) -> Tensor:
    """Returns the minimized losses, (T,): the preference losses plus the SFT term times `sft_weight`, or times 1 where
    the loss includes it.

    Args:
        preference: (T,), from `preference_losses`.
        sft: (T,), from `sft_losses`.
        config: gives the weight of the SFT term.
    """
    weight = 1.0 if config.facts.includes_sft else config.sft_weight
    return preference + weight * sft if weight else preference


def completion_rewards(terms: PairTerms, config: LossConfig) -> Tensor | None:
    """Returns the rewards of the completions, (B,), nats times beta, without gradient; None where the loss has none.

    "implicit" is beta (pi_logp - ref_logp), summed over tokens also where the loss is length-normalized: section 4 of
    the DPO paper. "per_token" is beta pi_logp / n: section 2.2 of the SimPO paper.
    """
    rewards = {"implicit": terms.log_ratios, "per_token": terms.pi_logps / terms.lengths, None: None}
    chosen = rewards[config.facts.rewards]
    return None if chosen is None else config.beta * chosen.detach()
