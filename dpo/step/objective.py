"""From the log-probabilities of a packed batch to the minimized loss of each pair, and the rewards."""

from torch import Tensor

from dpo.batch.packing import PackedBatch
from dpo.config import LossConfig
from dpo.step.losses import implicit_rewards, preference_losses, sft_losses, total_losses


def pair_losses(pi_logps: Tensor, batch: PackedBatch, config: LossConfig) -> tuple[Tensor, Tensor | None]:
    """Returns the losses and the rewards of one micro-batch.

    The sum of the losses of all micro-batches of all ranks, divided by `batch.pairs_in_step`, is the step's
    `train/loss`. Rewards are beta (pi_logp - ref_logp), summed over tokens also where the loss is length-normalized,
    without gradient.

    Args:
        pi_logps: (B,) nats, in the dtype of `batch.ref_logps`.
        batch: the micro-batch of which these are the completions, on the device of `pi_logps`.
        config: the loss; `beta` also scales the rewards.

    Returns:
        The losses, (T,), with gradient, and the rewards, (B,), in nats times beta; None as rewards without a reference.
    """
    preference = batch_preferences(pi_logps, batch, config)
    sft = sft_losses(pi_logps, batch.yw_idxs, batch.pairs_in_step, batch.winner_tokens_in_step)
    ref_logps = reference_of(batch, config)
    rewards = None if ref_logps is None else implicit_rewards(pi_logps, ref_logps, config.beta)
    return total_losses(preference, sft, config), rewards


def batch_preferences(pi_logps: Tensor, batch: PackedBatch, config: LossConfig) -> Tensor:
    """Returns the preference loss of each pair of one micro-batch, without the SFT term.

    Args:
        pi_logps: (B,) nats, in the dtype of `batch.ref_logps`.
        batch: the micro-batch of which these are the completions; its `ref_logps` must be set where the loss has a
            reference.
        config: the loss.

    Returns:
        The preference losses, (T,), one per pair, with gradient.
    """
    ref_logps = reference_of(batch, config)
    return preference_losses(pi_logps, ref_logps, batch.lengths, batch.yw_idxs, batch.yl_idxs, config)


def reference_of(batch: PackedBatch, config: LossConfig) -> Tensor | None:
    """Returns the batch's `ref_logps` (B,); None where the loss uses no reference."""
    if not config.facts.uses_reference:
        return None
    assert batch.ref_logps is not None, "packed before the reference's log-probabilities were known"
    return batch.ref_logps
