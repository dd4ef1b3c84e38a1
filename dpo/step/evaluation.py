"""Evaluation: plans, packing and log-probabilities as in training, without gradients.

The pairs of the set are spread over plans, lanes, micro-batches and trees, in an order that balances the work. Each
pair keeps its id, its index in the set, so that the values of single pairs come back in the order of the set:

    pairs 0..P-1 -> plans of 1024, by prompt -> trees with `pair_ids` -> each lane: (ids, values) -> gathered -> (P,)
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dpo.base.prefetch import prefetch
from dpo.batch.packer import Packer, evaluation_plans
from dpo.batch.packing import PackedBatch
from dpo.batch.trees import Tree
from dpo.config import LossConfig
from dpo.distributed.collectives import all_gather, gather_lanes
from dpo.distributed.preemption import StopRequest
from dpo.distributed.world import use_device
from dpo.model.policy import Policy, completion_logps, reshard
from dpo.pairs.pair_set import PairSet
from dpo.step.metrics import StepMetrics, pair_means
from dpo.step.objective import pair_losses


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation over all P pairs of the evaluation set, each of which has weight 1."""

    metrics: dict[str, float]
    """The metrics of `pair_means`."""
    pairs: Mapping[str, np.ndarray]
    """The values of each pair in the order of the set, (P,) each, in the dtype of the policy: see `pair_values`."""

    @property
    def margins(self) -> np.ndarray:
        """Returns the reward margin of each pair, (P,) float32; (0,) where the loss has no rewards."""
        if "rewards_chosen" not in self.pairs:
            return np.zeros(0, np.float32)
        margins = self.pairs["rewards_chosen"] - self.pairs["rewards_rejected"]
        return np.asarray(margins, np.float32)


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
    sums, ids, found = StepMetrics(policy.device), list[int](), list[dict[str, Tensor]]()
    must_stop = False
    plans = evaluation_plans(pairs, packer)
    with torch.no_grad(), closing(prefetch(packer.pack, plans, partial(use_device, policy.device))) as parts:
        for plan, batches in zip(plans, parts, strict=True):
            for trees, batch in zip(packer.trees(plan), (batch.to(policy.device) for batch in batches), strict=True):
                pi_logps = completion_logps(policy, batch)
                losses, rewards = pair_losses(pi_logps, batch, loss)
                sums.add(losses, rewards, pi_logps, batch)
                ids += pair_ids(trees)
                found.append(pair_values(pi_logps, rewards, batch))
            must_stop = any(all_gather(stop_requested()))
            if must_stop:
                break
    reshard(policy)
    if must_stop:
        return None
    metrics = pair_means(sums.reduce(), loss.facts)
    own = {name: torch.cat([values[name] for values in found]).cpu().numpy() for name in found[0]} if found else {}
    return Evaluation(metrics, in_order(gather_lanes((np.array(ids, np.int64), own)), len(pairs)))


def pair_ids(trees: Sequence[Tree]) -> list[int]:
    """Returns the ids of the pairs of a micro-batch, in the order of `PackedBatch.yw_idxs`."""
    return [number for tree in trees for number in tree.pair_ids]


def pair_values(pi_logps: Tensor, rewards: Tensor | None, batch: PackedBatch) -> dict[str, Tensor]:
    """Returns the values of each pair of a micro-batch, (T,) each, without waiting for the device.

    logps_chosen      log-probability of the winner under the policy, nats, summed over its tokens
    logratios_chosen  the same minus that under the reference; absent without a reference
    rewards_chosen    the reward that the metrics have the mean of

    and `logps_rejected`, `logratios_rejected` and `rewards_rejected` of the loser. Without rewards, as for the loss
    `sft`, no loser is computed and there is only `logps_chosen`.

    Args:
        pi_logps: (B,) nats under the policy.
        rewards: (B,), from `pair_losses`; None where the loss has none.
        batch: the micro-batch, on the same device; its `ref_logps` are set where the loss has a reference.
    """
    if rewards is None:
        return {"logps_chosen": pi_logps[batch.yw_idxs]}
    columns = {"logps": pi_logps, "rewards": rewards}
    if batch.ref_logps is not None:
        columns["logratios"] = pi_logps - batch.ref_logps
    sides = {"chosen": batch.yw_idxs, "rejected": batch.yl_idxs}
    return {f"{name}_{side}": column[idxs] for name, column in columns.items() for side, idxs in sides.items()}


def in_order(lanes: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]], num_pairs: int) -> dict[str, np.ndarray]:
    """Returns the values of all pairs, (P,) each, in the order of the pairs' ids.

    Args:
        lanes: of each lane the ids of its pairs, and its values in the same order.
        num_pairs: P; the ids of all lanes together are 0 to P - 1.
    """
    ids = np.concatenate([numbers for numbers, _ in lanes])
    order = np.argsort(ids)
    assert np.array_equal(ids[order], np.arange(num_pairs)), "an evaluation has every pair once"
    names = lanes[0][1]
    return {name: np.concatenate([values[name] for _, values in lanes])[order] for name in names}
