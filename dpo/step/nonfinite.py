"""Finds the pairs that make a step's gradient, loss or metrics NaN or infinite. Only a failed step comes here.

1. The values that each rank has kept tell the micro-batches in which the log-probability of a winner or a loser, or a
   loss, is not finite.
2. Where the weights are not finite, all pairs of these micro-batches are returned: nothing tells them apart.
3. Where all values are finite, the gradient alone is not: the micro-batches are computed again one by one, on one rank
   at a time, up to the first whose gradient is not finite.
4. A NaN spreads to the other trees of its row, through attention that is masked. So the trees of these micro-batches
   are computed again one by one, at most MOST_ALONE of them; the pairs of those that are finite alone are left out.

With two ranks of two micro-batches each, the last of which has three trees, of which the second is bad, 3. and 4. take

    pass       1       2        3        4        5        6        7
    rank 0     first   second   filler   filler   filler   filler   filler
    rank 1     filler  filler   first    second   tree 1   tree 2   tree 3

A filler adds exactly 0 (`packing.FILLER`), so that every rank issues the collectives of every pass. Rank 0 tells how
many there may be. A request to stop ends the search on every rank after the pass in which it came.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from dpo.batch.packer import Packer
from dpo.batch.packing import PackedBatch
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree, grow_trees
from dpo.config import LossConfig
from dpo.distributed.collectives import all_gather
from dpo.distributed.preemption import StopRequest
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.model.weights import are_finite
from dpo.pairs.pair_set import Pair
from dpo.step.evaluation import pair_ids
from dpo.step.objective import pair_losses
from dpo.step.optim import square_norm
from dpo.step.update import BatchValues
from dpo.terminal.console import say
from dpo.watch.beats import stand

BAD_WEIGHTS = "the weights are not finite either"
Place = tuple[int, int]
"""Rank and number of a micro-batch, from 1."""
MOST_ALONE = 64
"""Trees that are computed alone."""


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
    stop_requested: StopRequest
    """Asked after each pass; whether this rank was asked to stop."""

    def verdicts(self, parts: Sequence[tuple[int, Sequence[Tree]]]) -> Iterator[bool]:
        """Yields of each part whether log-probabilities, losses and gradient of its trees are finite, which its rank
        computes while the others compute fillers. Ends early, on every rank, where any rank is asked to stop. Every
        rank must take as many as the others, or the rest hang.
        """
        for rank, trees in parts:
            answers = all_gather((self._is_finite_here(rank, trees), self.stop_requested()))
            yield all(is_finite for is_finite, _ in answers)
            if any(must_stop for _, must_stop in answers):
                return

    def _is_finite_here(self, rank: int, trees: Sequence[Tree]) -> bool:
        stand("the search for the pairs")
        lanes = range(self.packer.num_lanes)
        plan = replace(self.plan, micro_batches=tuple((tuple(trees) if lane == rank else (),) for lane in lanes))
        batch = self.packer.pack(plan)[0].to(self.policy.device)
        announce_backward(self.policy, is_last=True)
        pi_logps = completion_logps(self.policy, batch)
        losses, _ = pair_losses(pi_logps, batch, self.loss)
        (losses.sum() / batch.pairs_in_step).backward()
        values = [*pi_logps.tolist(), *losses.tolist(), float(square_norm(self.policy.model.parameters()))]
        self.policy.model.zero_grad(set_to_none=True)
        return all(map(math.isfinite, values))


def find_pairs(again: Again, failed: FailedStep) -> Found:
    """Returns the pairs that make a step not finite. Every rank must get here, or the rest hang.

    Args:
        again: computes parts of the step again; the policy has no gradient.
        failed: the step.
    """
    stand("the search for the pairs")
    pairs = [pair for own in all_gather(_own_pairs(again.packer, failed)) for pair in own]
    places, how = sorted({pair.place for pair in pairs if not pair.is_finite}), ""
    if not weights_are_finite(again.policy):
        of_places = tuple(pair for pair in pairs if pair.place in places)
        return Found(of_places or tuple(pairs), BAD_WEIGHTS, are_bad=bool(places))
    if not places:
        places, how = _first_bad_place(again)
    if not places:
        return Found(tuple(pairs), f"{how}; the file has all pairs of the step", are_bad=False)
    suspects, how_far = _suspects(again, places)
    found = tuple(pair for pair in pairs if (pair.place, pair.id) in suspects)
    return Found(found, "; ".join(filter(None, (how, how_far))))


def bad_alone(again: Again, pairs: Sequence[Pair]) -> tuple[list[Pair], str]:
    """Returns the pairs of an evaluation but those that are finite when each is computed alone, or all of them where
    each is, and what is to be known of them. Every rank must get here, or the rest hang.
    """
    if not weights_are_finite(again.policy):
        return list(pairs), BAD_WEIGHTS
    cleared, how = _cleared_alone(again, [(0, tree) for pair in pairs for tree in grow_trees([pair])])
    return [pair for number, pair in enumerate(pairs) if number not in cleared] or list(pairs), how


def weights_are_finite(policy: Policy) -> bool:
    """Returns whether the weights of all ranks are finite. Every rank must get here, or the rest hang."""
    return all(all_gather(are_finite(policy.model.parameters())))


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


def _first_bad_place(again: Again) -> tuple[list[Place], str]:
    """Returns the first micro-batch that is not finite when it is computed again, alone, and what is to be known of it;
    none where all are finite. Every rank must get here, or the rest hang.
    """
    parts = list(_micro_batches(again.plan))
    _tell(f"micro-batches are computed again one by one, {len(parts)} at most")
    computed = 0
    for is_finite in again.verdicts([(place[0], trees) for place, trees in parts]):
        if not is_finite:
            return [parts[computed][0]], "their log-probabilities and losses are finite, their gradient is not"
        computed += 1
    if computed < len(parts):
        return [], f"a request to stop ended the search after {computed} of {len(parts)} micro-batches"
    return [], "computed again one by one, each micro-batch has a finite gradient"


def _micro_batches(plan: StepPlan) -> Iterator[tuple[Place, Sequence[Tree]]]:
    """Yields the trees of each micro-batch that has any, rank after rank: each lane is one rank."""
    for rank, micro_batches in enumerate(plan.micro_batches):
        for number, trees in enumerate(micro_batches, start=1):
            if trees:
                yield (rank, number), trees


def _suspects(again: Again, places: Sequence[Place]) -> tuple[set[tuple[Place, int]], str]:
    """Returns place and id of the pairs of some micro-batches but for those of trees that are finite alone; all pairs
    of a micro-batch whose trees all are. And what is to be known of them. Every rank must get here, or the rest hang.
    """
    trees_of = {place: again.plan.micro_batches[place[0]][place[1] - 1] for place in places}
    several = [(place, tree) for place, trees in trees_of.items() for tree in trees if len(trees) > 1]
    cleared, how = _cleared_alone(again, [(place[0], tree) for place, tree in several])
    good = {id(several[number][1]) for number in cleared}
    left = {place: [tree for tree in trees if id(tree) not in good] or trees for place, trees in trees_of.items()}
    return {(place, number) for place, trees in left.items() for number in pair_ids(trees)}, how


def _cleared_alone(again: Again, trees: Sequence[tuple[int, Tree]]) -> tuple[set[int], str]:
    """Returns the numbers of the trees that are finite alone, each computed by its rank, and how far that went where
    not all were computed. Every rank must get here, or the rest hang.
    """
    if not trees:
        return set(), ""
    most = min(len(trees), MOST_ALONE)
    _tell(f"prompts are computed again alone, {most} of {len(trees)}")
    verdicts = list(again.verdicts([(rank, [tree]) for rank, tree in trees[:most]]))
    cleared = {number for number, is_finite in enumerate(verdicts) if is_finite}
    if len(verdicts) == len(trees):
        return cleared, ""
    why = "which is the most" if len(verdicts) == most else "then came a request to stop"
    return cleared, f"{len(verdicts)} of {len(trees)} prompts were computed alone, {why}; the others are named unseen"


def _tell(what: str) -> None:
    """Tells, on rank 0, how many passes a search takes."""
    if dist.get_rank() == 0:
        say(f"not finite: searches for the pairs; {what}")
