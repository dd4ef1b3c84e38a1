"""A pass without gradients: the evaluation set through the path of training."""

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
    """The metrics of `pair_means` over a whole evaluation set, every pair weighing 1, and the reward margin of each
    pair, (pairs,), in no order (none where the loss has no reference).
    """

    metrics: dict[str, float]
    margins: np.ndarray


def evaluate(
    policy: Policy, pairs: PairSet, packer: Packer, loss: LossConfig, stop_requested: StopRequest
) -> Evaluation | None:
    """An evaluation without gradients; None where a rank was asked to stop on the way. Every rank must get here."""
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
    metrics = pair_means(sums.reduce(), loss.facts.uses_reference)
    everywhere = gather_lanes(torch.cat(margins).float().cpu().numpy()) if loss.facts.uses_reference else [np.zeros(0)]
    return Evaluation(metrics, np.concatenate(everywhere))
