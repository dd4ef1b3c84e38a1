"""Evaluation: plans, packing and log-probabilities as in training, without gradients."""

from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dpo.base.prefetch import prefetch
from dpo.batch.packer import Packer, evaluation_plans
from dpo.config import LossConfig
from dpo.data.pair_set import PairSet
from dpo.distributed.collectives import all_gather, gather_lanes
from dpo.distributed.preemption import StopRequest
from dpo.distributed.world import use_device
from dpo.model.policy import Policy, completion_logps, reshard
from dpo.step.metrics import StepMetrics, pair_means
from dpo.step.objective import pair_losses


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation over all P pairs of the evaluation set, each of which has weight 1."""

    metrics: dict[str, float]
    """The metrics of `pair_means`."""
    margins: np.ndarray
    """The reward margin of each pair, (P,), in no particular order; (0,) where the loss has no rewards."""


def evaluate(
    policy: Policy, pairs: PairSet, packer: Packer, loss: LossConfig, stop_requested: StopRequest
) -> Evaluation | None:
    """Evaluates the policy on all pairs, without gradients. Every rank must get here, or the rest hang.

    Args:
        policy: the sharded model.
        pairs: the evaluation set, the same on every rank.
        packer: packs the micro-batches, in a thread that runs ahead; its `ref_logps` must be set where the loss has a
            reference.
        loss: the loss that is evaluated, with its SFT term.
        stop_requested: asked after each plan; whether this rank was asked to stop.

    Returns:
        The same result on every rank; None where any rank was asked to stop before the end.
    """
    sums, margins = StepMetrics(policy.device), [torch.zeros(0, device=policy.device)]
    must_stop = False
    plans = evaluation_plans(pairs, packer)
    with torch.no_grad(), closing(prefetch(packer.pack, plans, partial(use_device, policy.device))) as parts:
        for batches in parts:
            for batch in (batch.to(policy.device) for batch in batches):
                pi_logps = completion_logps(policy, batch)
                losses, rewards = pair_losses(pi_logps, batch, loss)
                sums.add(losses, rewards, pi_logps, batch)
                if rewards is not None:
                    margins.append(rewards[batch.yw_idxs] - rewards[batch.yl_idxs])
            must_stop = any(all_gather(stop_requested()))
            if must_stop:
                break
    reshard(policy)
    if must_stop:
        return None
    has_rewards = loss.facts.rewards is not None
    metrics = pair_means(sums.reduce(), has_rewards)
    everywhere = gather_lanes(torch.cat(margins).float().cpu().numpy()) if has_rewards else [np.zeros(0)]
    return Evaluation(metrics, np.concatenate(everywhere))
