"""Finds the pairs that make a step's gradient, loss or metrics NaN or infinite. Only a failed step comes here.

First the values that each rank has kept of its micro-batches: a pair is bad where the log-probability of its winner or
loser, or its loss, is not finite. Where all of them are finite, the gradient alone is not: the micro-batches are
computed again one by one, on one rank at a time. With two ranks of two micro-batches each, of which the last is bad:

    pass       1             2             3         4
    rank 0     its first     its second    filler    filler
    rank 1     filler        filler        its first its second     -> all pairs of rank 1, micro-batch 2

A filler adds exactly 0 (`packing.FILLER`), so that every rank issues the collectives of every pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dpo.batch.packer import Packer
from dpo.batch.packing import PackedBatch
from dpo.batch.plan import StepPlan
from dpo.config import LossConfig
from dpo.distributed.collectives import all_gather
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.step.evaluation import pair_ids
from dpo.step.objective import pair_losses
from dpo.step.optim import square_norm
from dpo.step.update import BatchValues


@dataclass(frozen=True)
class StepPair:
    """A pair of a step, with its values there."""

    rank: int
    micro_batch: int
    """From 1."""
    id: int
    """Its index in the `PairSet`."""
    logp_chosen: float
    """The log-probability of the winner under the policy, nats."""
    logp_rejected: float
    """The same of the loser."""
    loss: float

    @property
    def is_finite(self) -> bool:
        """Returns whether all its values are finite."""
        return all(map(math.isfinite, (self.logp_chosen, self.logp_rejected, self.loss)))


@dataclass(frozen=True)
class Found:
    """The pairs that were found, and how; the same on every rank."""

    pairs: tuple[StepPair, ...]
    how: str
    """Empty where each of the pairs has a value that is not finite."""


@dataclass(frozen=True)
class FailedStep:
    """A step that is not finite, on this rank."""

    plan: StepPlan
    batches: Sequence[PackedBatch]
    """This lane's micro-batches, in host memory."""
    values: Sequence[BatchValues]
    """Of each of the micro-batches."""


def find_pairs(policy: Policy, packer: Packer, failed: FailedStep, loss: LossConfig) -> Found:
    """Returns the pairs that make a step not finite. Every rank must get here, or the rest hang.

    Args:
        policy: the sharded model, with the weights of the failed step, and without a gradient.
        packer: has packed the step.
        failed: the step.
        loss: the loss that was minimized.
    """
    pairs = [pair for own in all_gather(_own_pairs(packer, failed)) for pair in own]
    bad = tuple(pair for pair in pairs if not pair.is_finite)
    if bad:
        return Found(bad, "" if all(all_gather(weights_are_finite(policy))) else "the weights are not finite either")
    place = _first_bad_gradient(policy, failed.batches, _filler(packer, failed.plan), loss)
    if place is None:
        return Found(tuple(pairs), "computed again one by one, each micro-batch has a finite gradient")
    guilty = tuple(pair for pair in pairs if (pair.rank, pair.micro_batch) == place)
    return Found(guilty, "their log-probabilities and losses are finite, the gradient of the micro-batch is not")


def weights_are_finite(policy: Policy) -> bool:
    """Returns whether this rank's shard of the weights is finite."""
    shards = (p.to_local() if isinstance(p, DTensor) else p for p in policy.model.parameters())
    return all(bool(torch.isfinite(shard).all()) for shard in shards)


def _own_pairs(packer: Packer, failed: FailedStep) -> list[StepPair]:
    """Returns this rank's pairs of the step, in the order of its micro-batches."""
    rank, found = dist.get_rank(), []
    rows = zip(packer.trees(failed.plan), failed.batches, failed.values, strict=True)
    for number, (trees, batch, values) in enumerate(rows, start=1):
        logps, losses = values.pi_logps.tolist(), values.losses.tolist()
        sides = zip(batch.yw_idxs.tolist(), batch.yl_idxs.tolist(), strict=True)
        for pair, (winner, loser), of_pair in zip(pair_ids(trees), sides, losses, strict=True):
            found.append(StepPair(rank, number, pair, logps[winner], logps[loser], of_pair))
    return found


def _filler(packer: Packer, plan: StepPlan) -> PackedBatch:
    """Returns a micro-batch without pairs, with the denominators of the step."""
    nothing: tuple[tuple[()], ...] = ((),)
    return packer.pack(replace(plan, micro_batches=(nothing,) * packer.num_lanes))[0]


def _first_bad_gradient(
    policy: Policy, batches: Sequence[PackedBatch], filler: PackedBatch, loss: LossConfig
) -> tuple[int, int] | None:
    """Returns rank and number of the first micro-batch whose gradient is not finite; None where all are.

    Every rank must get here, or the rest hang.
    """
    for rank in range(dist.get_world_size()):
        for number, batch in enumerate(batches, start=1):
            if not _has_finite_gradient(policy, batch if dist.get_rank() == rank else filler, loss):
                return rank, number
    return None


def _has_finite_gradient(policy: Policy, batch: PackedBatch, loss: LossConfig) -> bool:
    """Returns whether the gradient of one micro-batch of each rank, added up, is finite. Every rank must get here, or
    the rest hang.
    """
    batch = batch.to(policy.device)
    announce_backward(policy, is_last=True)
    losses, _ = pair_losses(completion_logps(policy, batch), batch, loss)
    (losses.sum() / batch.pairs_in_step).backward()
    square = float(square_norm(policy.model.parameters()))
    policy.model.zero_grad(set_to_none=True)
    return all(map(math.isfinite, all_gather(square)))
