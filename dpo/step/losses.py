"""The losses of preference pairs, on the paper's index signature.

Throughout, T pairs stand among B completions; `pi_logps` and `ref_logps` (B,) are log-probabilities of whole
completions given their prompts in nats; `lengths` (B,) counts their scored tokens, EOS included; `yw_idxs` and
`yl_idxs` (T,) index winners and losers. Most losses depend on the margin h of a pair alone:

    log_ratios = pi_logps - ref_logps                     (B,) nats; divided by lengths if `loss.length_normalized`
    h          = log_ratios[yw_idxs] - log_ratios[yl_idxs]      (T,)

Every loss returns (T,), one value per pair, never averaged: a step divides their sum by its global number of pairs.
`LOSSES` has one entry per `loss.name`; `dpo/config/loss_facts.py` has the facts that config needs of it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.config import LossConfig
from dpo.config.loss_facts import LossName

# --- functions of the margin -----------------------------------------------------------------------------------------


def dpo_loss(h: Tensor, config: LossConfig) -> Tensor:
    """Returns -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), (T,), with eps = label_smoothing.

    Equation 7 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; eps > 0 is conservative DPO (the probability
    that a label is wrong), equation 3 of https://ericmitchell.ai/cdpo.pdf.
    """
    eps = config.label_smoothing
    return -(1 - eps) * F.logsigmoid(config.beta * h) - eps * F.logsigmoid(-config.beta * h)


def ipo_loss(h: Tensor, config: LossConfig) -> Tensor:
    """Returns (h - 1/(2 beta))^2, (T,): equation 17 of Azar et al. 2023, https://arxiv.org/abs/2310.12036 (beta is
    their tau).
    """
    return (h - 1 / (2 * config.beta)) ** 2


def hinge_loss(h: Tensor, config: LossConfig) -> Tensor:
    """Returns max(0, 1 - beta h), (T,): SLiC's hinge on DPO's margin, Liu et al. 2023,
    https://arxiv.org/abs/2309.06657.
    """
    return torch.relu(1 - config.beta * h)


def robust_loss(h: Tensor, config: LossConfig) -> Tensor:
    """Returns [(1 - eps)(-log sigmoid(beta h)) - eps (-log sigmoid(-beta h))] / (1 - 2 eps), (T,), eps < 1/2.

    Equation 12 of Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409: unbiased when a share eps of labels is
    flipped.
    """
    eps, scaled = config.label_smoothing, config.beta * h
    return (-(1 - eps) * F.logsigmoid(scaled) + eps * F.logsigmoid(-scaled)) / (1 - 2 * eps)


# --- the table -------------------------------------------------------------------------------------------------------

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, LossConfig], Tensor]
"""(log_ratios (B,), pi_logps (B,), lengths (B,), yw_idxs (T,), yl_idxs (T,), config) -> losses (T,). The log-ratios are
NaN where the loss uses no reference."""


@dataclass(frozen=True)
class Loss:
    """An entry of `LOSSES`."""

    losses: LossFunction
    at_zero: Callable[[LossConfig], float] | None
    """The loss of a pair whose log-ratios are 0, derived by hand: the check of the first step compares `losses` with
    it. None where the loss uses no reference."""


def of_margin(function: Callable[[Tensor, LossConfig], Tensor]) -> LossFunction:
    """Returns the entry's form of a loss that depends on the margin h (T,) of a pair alone."""

    def losses(
        log_ratios: Tensor, pi_logps: Tensor, lengths: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, config: LossConfig
    ) -> Tensor:
        return function(log_ratios[yw_idxs] - log_ratios[yl_idxs], config)

    return losses


def no_losses(
    log_ratios: Tensor, pi_logps: Tensor, lengths: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, config: LossConfig
) -> Tensor:
    """Returns zeros (T,): `sft` is the SFT term and nothing else.

    Args:
        pi_logps: (B,) nats; the result has its dtype and device.
        yw_idxs: (T,) int64; the result has its length.
        log_ratios, lengths, yl_idxs, config: not used, but part of a `LossFunction`.
    """
    return torch.zeros_like(pi_logps[yw_idxs])


LOSSES: Mapping[LossName, Loss] = {
    "dpo": Loss(of_margin(dpo_loss), at_zero=lambda config: math.log(2)),
    "ipo": Loss(of_margin(ipo_loss), at_zero=lambda config: 1 / (4 * config.beta**2)),
    "hinge": Loss(of_margin(hinge_loss), at_zero=lambda config: 1.0),
    "robust": Loss(of_margin(robust_loss), at_zero=lambda config: math.log(2)),
    "sft": Loss(no_losses, at_zero=None),
}
"""The losses by `loss.name`."""


# --- from log-probabilities to minimized losses ----------------------------------------------------------------------


def preference_losses(
    pi_logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    config: LossConfig,
) -> Tensor:
    """Returns the configured preference loss of each pair.

    Args:
        pi_logps: (B,) nats under the policy, floating point; the losses have its dtype.
        ref_logps: (B,) nats, in the dtype of `pi_logps`; None if and only if the loss uses no reference.
        lengths: (B,) integers: scored tokens of each completion, EOS included.
        yw_idxs, yl_idxs: (T,) int64: the winner and the loser of each pair, indices of the B completions.
        config: `length_normalized` divides the log-ratio of each completion by its length, which makes h nats per
            token: section 5.1.2 of Lambert et al. 2024, https://arxiv.org/abs/2411.15124.

    Returns:
        (T,), one loss per pair, not averaged, with gradient.
    """
    assert (ref_logps is not None) == config.facts.uses_reference, config.name
    log_ratios = torch.full_like(pi_logps, math.nan) if ref_logps is None else pi_logps - ref_logps
    if config.length_normalized:
        log_ratios = log_ratios / lengths
    return LOSSES[config.name].losses(log_ratios, pi_logps, lengths, yw_idxs, yl_idxs, config)


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


def implicit_rewards(pi_logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Returns beta (pi_logp - ref_logp), (B,), nats times beta, without gradient: section 4 of the DPO paper.

    Args:
        pi_logps: (B,) nats under the policy.
        ref_logps: (B,) nats under the reference, in the same order.
        beta: `loss.beta`.
    """
    return beta * (pi_logps - ref_logps).detach()
