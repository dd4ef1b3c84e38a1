"""From log-probabilities of a packed batch to what is minimized: the configured loss of each pair, and the rewards."""

from torch import Tensor

from dpo.batch.packing import PackedBatch
from dpo.config import LossConfig
from dpo.step.losses import implicit_rewards, preference_losses, sft_losses, total_losses


def pair_losses(pi_logps: Tensor, batch: PackedBatch, config: LossConfig) -> tuple[Tensor, Tensor | None]:
    """Returns the losses (T,) and the rewards (B,) of one micro-batch; None as rewards without a reference.

    The sum of the losses of all micro-batches of all ranks, divided by `batch.pairs_in_step`, is the step's
    `train/loss`. Rewards are beta (pi_logp - ref_logp), summed over tokens also where the loss is length-normalized;
    no gradient.
    """
    sft = sft_losses(pi_logps, batch.yw_idxs, batch.pairs_in_step, batch.winner_tokens_in_step)
    if not has_reference(config):
        return total_losses(None, sft, config), None
    assert batch.ref_logps is not None, "packed before the reference's log-probabilities were known"
    preference = preference_losses(pi_logps, batch.ref_logps, batch.lengths, batch.yw_idxs, batch.yl_idxs, config)
    return total_losses(preference, sft, config), implicit_rewards(pi_logps, batch.ref_logps, config.beta)


def has_reference(config: LossConfig) -> bool:
    """Whether the loss compares with a reference: all but `sft` do."""
    return config.name != "sft"
