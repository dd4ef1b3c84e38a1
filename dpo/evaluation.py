"""Passes without gradients: the evaluation set through the path of training, and the check of the first step."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo.batches import Packer, evaluation_plans
from dpo.config import LossConfig
from dpo.distributed import all_gather
from dpo.errors import RunError
from dpo.losses import indifferent_loss, preference_losses
from dpo.metrics import StepMetrics, pair_means
from dpo.objective import has_reference, pair_losses
from dpo.packing import PackedBatch
from dpo.pair_set import PairSet
from dpo.policy import Policy, completion_logps, reshard
from dpo.preemption import StopRequest
from dpo.prefetch import prefetch


@dataclass(frozen=True)
class Evaluation:
    """The metrics of `pair_means` over a whole evaluation set, every pair weighing 1, and the reward margin of each
    pair, (pairs,), in no order (none where the loss has no reference).
    """

    figures: dict[str, float]
    margins: np.ndarray


def evaluate(
    policy: Policy, pairs: PairSet, packer: Packer, loss: LossConfig, head_bytes: int, stop_requested: StopRequest
) -> Evaluation | None:
    """An evaluation without gradients; None where a rank was asked to stop on the way. Every rank must get here."""
    metrics, margins = StepMetrics(policy.device), [torch.zeros(0, device=policy.device)]
    must_stop = False
    plans = evaluation_plans(pairs, packer)
    with torch.no_grad(), closing(prefetch(packer.pack, plans, policy.device)) as parts:
        for batches in parts:
            for batch in (batch.to(policy.device) for batch in batches):
                pi_logps = completion_logps(policy, batch, head_bytes)
                losses, rewards = pair_losses(pi_logps, batch, loss)
                metrics.add(losses, rewards, pi_logps, batch)
                margins.append(rewards[batch.yw_idxs] - rewards[batch.yl_idxs])
            must_stop = any(all_gather(stop_requested()))
            if must_stop:
                break
    reshard(policy)
    if must_stop:
        return None
    figures = pair_means(metrics.reduce(), has_reference(loss))
    everywhere = all_gather(torch.cat(margins).float().cpu().numpy()) if has_reference(loss) else [np.zeros(0)]
    return Evaluation(figures, np.concatenate(everywhere))


# --- the first step --------------------------------------------------------------------------------------------------


def verify_start(
    policy: Policy, batches: Sequence[PackedBatch], loss: LossConfig, compute: torch.dtype, head_bytes: int
) -> None:
    """Raises RunError unless the policy, before its first update, is its own reference on the first step's
    micro-batches:

    every |pi_logp - ref_logp| is within `allowed_differences`, and the preference loss is that of h = 0 within what
    this allows. Every rank must get here.
    """
    faults: list[tuple[float, str]] = []
    excess = torch.zeros((), dtype=torch.float64, device=policy.device)
    tf32 = policy.parallel.tf32 and policy.device.type == "cuda"
    with torch.no_grad():
        for batch in (batch.to(policy.device) for batch in batches):
            pi_logps = completion_logps(policy, batch, head_bytes)
            if len(batch.yw_idxs):
                allowed = allowed_differences(batch.ref_logps, batch.lengths, compute, tf32)
                faults.append(_worst_row(pi_logps, batch, allowed))
                excess += _loss_excess(pi_logps, batch, loss, allowed)
    reshard(policy)
    found = all_gather((max(faults, default=(0.0, "")), excess.item()))
    worst, row = max(fault for fault, _ in found)
    if worst > 1 or math.isnan(worst):
        raise RunError(
            f"step 1: the policy is not its own reference: {row}; the reference cache or the forward is at fault"
        )
    if sum(excess for _, excess in found) > 0:
        raise RunError(f"step 1: the preference loss is not that of an indifferent policy, {indifferent_loss(loss)}")


def allowed_differences(ref_logps: Tensor, lengths: Tensor, compute: torch.dtype, tf32: bool = False) -> Tensor:
    """(B,) nats by which two computations of one log-probability may differ: 1e-4 + 1e-5 |ref_logp|; 0.05 sqrt(tokens)
    in bfloat16; an eighth of it in TF32, whose mantissa has 3 bits more.
    """
    if compute == torch.bfloat16 or tf32:
        return (0.05 / 8 if tf32 else 0.05) * lengths.double().sqrt()
    return 1e-4 + 1e-5 * ref_logps.double().abs()


def _worst_row(pi_logps: Tensor, batch: PackedBatch, allowed: Tensor) -> tuple[float, str]:
    """(difference / allowed difference, description) of the completion that is furthest from its reference."""
    ratios = (pi_logps - batch.ref_logps).abs().double() / allowed
    row = int(ratios.nan_to_num(math.inf).argmax())
    start = int(batch.lengths[:row].sum())
    ids = batch.targets[start : start + int(batch.lengths[row])].tolist()
    what = f"pi_logp {pi_logps[row].item():.6g}, ref_logp {batch.ref_logps[row].item():.6g} nats for the completion of"
    return ratios[row].nan_to_num(math.inf).item(), f"{what} {len(ids)} tokens that begins with the ids {ids[:8]}"


def _loss_excess(pi_logps: Tensor, batch: PackedBatch, loss: LossConfig, allowed: Tensor) -> Tensor:
    """Sum over pairs of how far the preference loss is from that of h = 0, beyond what the allowed differences
    explain.
    """
    args = (batch.lengths, batch.yw_idxs, batch.yl_idxs, loss)
    losses = preference_losses(pi_logps.double(), batch.ref_logps.double(), *args)
    if loss.length_normalized:
        allowed = allowed / batch.lengths
    h = allowed[batch.yw_idxs] + allowed[batch.yl_idxs]
    # Every preference loss changes by at most |h| times the largest slope between 0 and h.
    slope = 1 / loss.beta + h if loss.name == "ipo" else loss.beta / (1 - 2 * loss.label_smoothing)
    return ((losses - indifferent_loss(loss)).abs() - 2 * slope * h - 1e-9).clamp(min=0).sum()
