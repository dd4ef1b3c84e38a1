"""Preference losses on the paper's index signature: log-probabilities of completions, and pairs as indices into them.

Throughout, T pairs stand among B completions; `pi_logps` and `ref_logps` (B,) are log-probabilities of whole
completions given their prompts in nats; `yw_idxs` and `yl_idxs` (T,) index winners and losers. For a pair

    h = (pi_logps[w] - ref_logps[w]) - (pi_logps[l] - ref_logps[l])        (nats)

Each loss returns `losses` (T,), one a pair, never averaged: a step divides their sum by its global number of pairs.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class LossConfig(Protocol):
    """What a loss must be told; `dpo.config.LossConfig` is the one that users write."""

    @property
    def name(self) -> str: ...
    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def length_normalized(self) -> bool: ...
    @property
    def sft_weight(self) -> float: ...


def dpo_loss(
    pi_logps: Tensor,
    ref_logps: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Direct Preference Optimization: losses (T,) and rewards (B,).

        loss = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h),  eps = label_smoothing
        reward = beta (pi_logp - ref_logp), without gradient

    Equation 7 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; eps > 0 is conservative DPO (the probability
    that a label is wrong), equation 3 of https://ericmitchell.ai/cdpo.pdf.
    """
    h = log_ratio_margins(pi_logps - ref_logps, yw_idxs, yl_idxs)
    return sigmoid_losses(h, beta, label_smoothing), implicit_rewards(pi_logps, ref_logps, beta)


def sigmoid_losses(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO's loss as a function of the margin h, (T,): see `dpo_loss`."""
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def implicit_rewards(pi_logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """beta (pi_logp - ref_logp), shape (B,), nats times beta, without gradient: section 4 of the DPO paper."""
    return beta * (pi_logps - ref_logps).detach()


def log_ratio_margins(log_ratios: Tensor, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """h (T,): how much more the policy prefers the winner than the reference does, in nats, from log_ratios (B,)."""
    return log_ratios[yw_idxs] - log_ratios[yl_idxs]


def ipo_losses(h: Tensor, beta: float) -> Tensor:
    """(h - 1/(2 beta))^2, (T,): equation 17 of Azar et al. 2023, https://arxiv.org/abs/2310.12036 (beta is their
    tau).
    """
    return (h - 1 / (2 * beta)) ** 2


def hinge_losses(h: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta h), (T,): SLiC's hinge on DPO's margin, Liu et al. 2023, https://arxiv.org/abs/2309.06657."""
    return torch.relu(1 - beta * h)


def robust_losses(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """[(1 - eps)(-log sigmoid(beta h)) - eps (-log sigmoid(-beta h))] / (1 - 2 eps), (T,), eps < 1/2.

    Equation 12 of Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409: unbiased when a share eps of labels is
    flipped.
    """
    eps = label_smoothing
    return (-(1 - eps) * F.logsigmoid(beta * h) + eps * F.logsigmoid(-beta * h)) / (1 - 2 * eps)


def preference_losses(
    pi_logps: Tensor, ref_logps: Tensor, lengths: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, config: LossConfig
) -> Tensor:
    """The configured preference loss, (T,). `lengths` (B,) counts scored tokens, for `length_normalized`:

    then each pi_logp - ref_logp is divided by its completion's length (EOS included), which makes h nats a token;
    length-normalized DPO as in section 5.1.2 of Lambert et al. 2024, https://arxiv.org/abs/2411.15124.
    """
    log_ratios = pi_logps - ref_logps
    if config.length_normalized:
        log_ratios = log_ratios / lengths
    h = log_ratio_margins(log_ratios, yw_idxs, yl_idxs)
    match config.name:
        case "dpo":
            return sigmoid_losses(h, config.beta, config.label_smoothing)
        case "ipo":
            return ipo_losses(h, config.beta)
        case "hinge":
            return hinge_losses(h, config.beta)
        case "robust":
            return robust_losses(h, config.beta, config.label_smoothing)
        case name:
            raise ValueError(f"loss.name: {name!r} is no preference loss; valid: dpo, ipo, hinge, robust")


def sft_losses(pi_logps: Tensor, yw_idxs: Tensor, pairs_in_step: int, winner_tokens_in_step: int) -> Tensor:
    """Each pair's share of the SFT term, (T,): -pi_logps[w] * pairs_in_step / winner_tokens_in_step.

    Scaled so that the *mean over the step's pairs* is sum(-pi_logps[w]) / sum(len(w)), the negative log-likelihood of
    the winners in nats a token, both sums over the whole step; a winner in three pairs counts three times.
    Used beside a preference loss in Pang et al. 2024 (RPO), https://arxiv.org/abs/2404.19733.
    """
    return -pi_logps[yw_idxs] * (pairs_in_step / max(winner_tokens_in_step, 1))


def total_losses(preference: Tensor | None, sft: Tensor, config: LossConfig) -> Tensor:
    """What is minimized, (T,): preference + sft_weight * sft, or the SFT term alone for `loss.name: sft`."""
    if preference is None:
        return sft
    return preference + config.sft_weight * sft if config.sft_weight else preference
