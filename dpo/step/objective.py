"""From the log-probabilities of a packed batch to the minimized loss of each pair, and the rewards."""

from torch import Tensor

from dpo.batch.packing import PackedBatch
from dpo.config import LossConfig
from dpo.step.losses import (
    PairTerms,
    completion_rewards,
    log_ratios,
    preference_losses,
    sft_losses,
    total_losses,
)


def pair_losses(pi_logps: Tensor, batch: PackedBatch, config: LossConfig) -> tuple[Tensor, Tensor | None]:
    """Returns the losses and the rewards of one micro-batch.

    The sum of the losses of all micro-batches of all ranks, divided by `batch.pairs_in_step`, is the step's
    `train/loss`. The weight of a pair multiplies its loss, the SFT term included, and changes no denominator.

    Args:
        pi_logps: (B,) nats, in the dtype of `batch.ref_logps`.
        batch: the micro-batch of which these are the completions, on the device of `pi_logps`.
        config: the loss; `beta` also scales the rewards.

    Returns:
        The losses, (T,), with gradient, and the rewards, (B,), in nats times beta, without; None as rewards where the
        loss has none.
    """
    terms = pair_terms(pi_logps, batch, config)
    sft = sft_losses(pi_logps, batch.yw_idxs, batch.pairs_in_step, batch.winner_tokens_in_step)
    losses = total_losses(preference_losses(terms, config), sft, config)
    return losses if batch.weights is None else batch.weights * losses, completion_rewards(terms, config)


def batch_preferences(pi_logps: Tensor, batch: PackedBatch, config: LossConfig) -> Tensor:
    """Returns the preference loss of each pair of one micro-batch, (T,), with gradient, without the SFT term and the
    weights of the pairs.

    Args:
        pi_logps: (B,) nats, in the dtype of `batch.ref_logps`.
        batch: the micro-batch of which these are the completions; its `ref_logps` must be set where the loss has a
            reference.
        config: the loss.
    """
    return preference_losses(pair_terms(pi_logps, batch, config), config)


def pair_terms(pi_logps: Tensor, batch: PackedBatch, config: LossConfig) -> PairTerms:
    """Returns the terms of the losses of one micro-batch; `batch.ref_logps` must be set where the loss has a
    reference.
    """
    ref_logps = batch.ref_logps if config.facts.uses_reference else None
    assert ref_logps is not None or not config.facts.uses_reference, (
        "packed before the reference's log-probabilities were known"
    )
    ratios = log_ratios(pi_logps, ref_logps)
    return PairTerms(ratios, pi_logps, batch.lengths, batch.yw_idxs, batch.yl_idxs, batch.margins)
