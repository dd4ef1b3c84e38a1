"""Preference losses from the values of completions, for tests."""

import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.step.losses import PairTerms, log_ratios, preference_losses


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def losses_of(
    pi_logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    config: LossConfig,
) -> Tensor:
    """The preference losses of the pairs, without margins."""
    terms = PairTerms(log_ratios(pi_logps, ref_logps), pi_logps, lengths, yw_idxs, yl_idxs)
    return preference_losses(terms, config)


def losses_of_pairs(
    policy: tuple[list[float], list[float]],
    config: LossConfig,
    reference: tuple[list[float], list[float]] | None = None,
    lengths: tuple[list[int], list[int]] | None = None,
) -> list[float]:
    """The preference losses of pairs of which each argument gives the winners' values, then the losers'; without
    lengths every completion has one token.
    """
    count = len(policy[0])
    both = torch.tensor(policy, dtype=torch.float64).reshape(-1)
    ref_logps = None if reference is None else torch.tensor(reference, dtype=torch.float64).reshape(-1)
    tokens = torch.ones_like(both) if lengths is None else torch.tensor(lengths).reshape(-1)
    winners = torch.arange(count)
    return losses_of(both, ref_logps, tokens, winners, winners + count, config).tolist()
