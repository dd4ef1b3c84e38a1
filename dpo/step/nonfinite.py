"""Finds the pairs that make a step's gradient, loss or metrics NaN or infinite. Only a failed step comes here.

1. The values that each rank has kept tell the micro-batches in which the log-probability of a winner or a loser, or a
   loss, is not finite.
2. Where all of them are finite, the gradient alone is not: the micro-batches are computed again one by one, on one rank
   at a time, up to the first whose gradient is not finite.
3. A NaN spreads to the other trees of its row, through attention that is masked. So the trees of these micro-batches
   are computed again one by one; the pairs of those that are not finite alone are returned.

With two ranks of two micro-batches each, the last of which has three trees, of which the second is bad, 2. and 3. take

    pass       1       2        3        4        5        6        7
    rank 0     first   second   filler   filler   filler   filler   filler
    rank 1     filler  filler   first    second   tree 1   tree 2   tree 3

A filler adds exactly 0 (`packing.FILLER`), so that every rank issues the collectives of every pass.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dpo.batch.packer import Packer
from dpo.batch.packing import PackedBatch
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree, grow_trees
from dpo.config import LossConfig
from dpo.distributed.collectives import all_gather
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.pairs.pair_set import Pair
from dpo.step.evaluation import pair_ids
from dpo.step.objective import pair_losses
from dpo.step.optim import square_norm
from dpo.step.update import BatchValues

Place = tuple[int, int]
"""Rank and number of a micro-batch, from 1."""
MOST_ALONE = 64
"""Pairs of an evaluation that are computed alone."""


@dataclass(frozen=True)
class StepPair:
    """A pair of a step, with its values there."""

    place: Place
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
    """The pairs that were found, the same on every rank."""

    pairs: tuple[StepPair, ...]
    how: str
    """What is to be known of them, in words; may be empty."""
    are_bad: bool = True
    """False where no pair was found: then these are all pairs of the step."""


@dataclass(frozen=True)
class FailedStep:
    """A step that is not finite, on this rank."""

    plan: StepPlan
    batches: Sequence[PackedBatch]
    """This lane's micro-batches, in host memory."""
    values: Sequence[BatchValues]
    """Of each of the micro-batches."""


@dataclass(frozen=True)
class Again:
    """Computes parts of a failed step again, with the weights that it began with."""

    policy: Policy
    packer: Packer
    plan: StepPlan
    loss: LossConfig

    def is_finite(self, rank: int, trees: Sequence[Tree]) -> bool:
        """Returns whether log-probabilities, losses and gradient of these trees are finite, which `rank` computes while
        the others compute fillers. Every rank must get here, or the rest hang.
        """
        lanes = range(self.packer.num_lanes)
        plan = replace(self.plan, micro_batches=tuple((tuple(trees) if lane == rank else (),) for lane in lanes))
        batch = self.packer.pack(plan)[0].to(self.policy.device)
        announce_backward(self.policy, is_last=True)
        pi_logps = completion_logps(self.policy, batch)
        losses, _ = pair_losses(pi_logps, batch, self.loss)
        (losses.sum() / batch.pairs_in_step).backward()
        values = [*pi_logps.tolist(), *losses.tolist(), float(square_norm(self.policy.model.parameters()))]
        self.policy.model.zero_grad(set_to_none=True)
        return all(all_gather(all(map(math.isfinite, values))))


def find_pairs(policy: Policy, packer: Packer, failed: FailedStep, loss: LossConfig) -> Found:
    """Returns the pairs that make a step not finite. Every rank must get here, or the rest hang.

    Args:
        policy: the sharded model, with the weights of the failed step, and without a gradient.
        packer: has packed the step.
        failed: the step.
        loss: the loss that was minimized.
    """
    again = Again(policy, packer, failed.plan, loss)
    pairs = [pair for own in all_gather(_own_pairs(packer, failed)) for pair in own]
    places = sorted({pair.place for pair in pairs if not pair.is_finite})
    how = "" if places else "their log-probabilities and losses are finite, their gradient is not"
    places = places or _first_bad_place(again)
    if not places:
        how = "computed again one by one, each micro-batch has a finite gradient; the file has all pairs of the step"
        return Found(tuple(pairs), how, are_bad=False)
    if not all(all_gather(weights_are_finite(policy))):
        how = "the weights are not finite either"
    alone = {(place, number) for place in places for number in _bad_ids(again, place)}
    return Found(tuple(pair for pair in pairs if (pair.place, pair.id) in alone), how)


def bad_alone(again: Again, pairs: Sequence[Pair]) -> list[Pair]:
    """Returns the pairs that are not finite when each is computed alone, of the first MOST_ALONE of them; all of them
    where each is finite alone. Every rank must get here, or the rest hang.
    """
    return [pair for pair in pairs[:MOST_ALONE] if not again.is_finite(0, grow_trees([pair]))] or list(pairs)


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
            found.append(StepPair((rank, number), pair, logps[winner], logps[loser], of_pair))
    return found


def _first_bad_place(again: Again) -> list[Place]:
    """Returns the first micro-batch that is not finite when it is computed again, alone; empty where all are finite.

    Every rank must get here, or the rest hang.
    """
    for place, trees in _micro_batches(again.plan):
        if not again.is_finite(place[0], trees):
            return [place]
    return []


def _micro_batches(plan: StepPlan) -> Iterator[tuple[Place, Sequence[Tree]]]:
    """Yields the trees of each micro-batch, rank after rank: each lane is one rank."""
    for rank, micro_batches in enumerate(plan.micro_batches):
        for number, trees in enumerate(micro_batches, start=1):
            yield (rank, number), trees


def _bad_ids(again: Again, place: Place) -> set[int]:
    """Returns the ids of the pairs of the trees of a micro-batch that are not finite alone; of all its pairs where each
    tree alone is finite. Every rank must get here, or the rest hang.
    """
    rank, number = place
    trees = again.plan.micro_batches[rank][number - 1]
    bad = [tree for tree in trees if len(trees) == 1 or not again.is_finite(rank, [tree])]
    return set(pair_ids(bad or trees))
