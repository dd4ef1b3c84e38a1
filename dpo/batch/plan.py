"""Which lane computes which trees of a step, in which micro-batch: a pure function of the step's trees.

Trees are balanced over the lanes by cost and packed into the same number of micro-batches on each lane. The gradient
does not depend on the plan: it is a scheduling decision. An example: trees of 50, 40, 30, 20 and 10 tokens, at a cost
of 1 FLOP per token, on 2 lanes with 60 tokens per micro-batch:

    balanced                lane 0: 50 + 20 + 10 = 80     lane 1: 40 + 30 = 70
    micro-batches needed    2: (50, 10), (20)             2: (40), (30)
    balanced once more      (50), (20, 10)                (40), (30): costs 50, 30 beside 40, 30
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dpo.batch.costs import CostModel, ForwardFlops
from dpo.batch.trees import Tree


@dataclass(frozen=True)
class StepPlan:
    """The trees of one step by lane and micro-batch, `micro_batches[lane][micro]`, and the step's denominators.

    Every lane has the same number of micro-batches. An empty micro-batch is packed as one tree without pairs
    (`packing.FILLER`).
    """

    micro_batches: tuple[tuple[tuple[Tree, ...], ...], ...]
    pairs_in_step: int
    """Pairs of all lanes."""
    winner_tokens_in_step: int
    """Tokens of the winners of all pairs; a completion that wins several pairs counts in each of them."""
    forward_flops: ForwardFlops
    """FLOPs of one forward pass over all trees, by the cost model."""
    num_oversized: int
    """The number of trees with more tokens than `tokens_per_micro_batch`."""

    @property
    def num_micro_batches(self) -> int:
        """Returns the number of micro-batches of each lane."""
        return len(self.micro_batches[0])


def plan_step(trees: Sequence[Tree], num_lanes: int, tokens_per_micro_batch: int, costs: CostModel) -> StepPlan:
    """Balances trees over lanes by cost and packs them into micro-batches of at most `tokens_per_micro_batch` tokens.

    A tree with more tokens has a micro-batch of its own. Every tree is in exactly one micro-batch of one lane.

    Args:
        trees: the trees of the step, of all lanes.
        num_lanes: lanes over which the trees are divided, at least 1.
        tokens_per_micro_batch: the maximum number of tokens of a lane's micro-batch.
        costs: FLOPs per tree, by which lanes and micro-batches are balanced.

    Returns:
        The plan of all lanes, the same on every rank that passes the same arguments.
    """
    budget = tokens_per_micro_batch
    by_lane = [[trees[i] for i in part] for part in balance([costs.cost(tree) for tree in trees], num_lanes)]
    num_micro_batches = max(1, *(len(_first_fit(part, budget)) for part in by_lane))
    return StepPlan(
        micro_batches=tuple(_micro_batches(part, num_micro_batches, budget, costs) for part in by_lane),
        pairs_in_step=sum(len(tree.pairs) for tree in trees),
        winner_tokens_in_step=sum(len(tree.completion_ids[w]) for tree in trees for w, _ in tree.pairs),
        forward_flops=costs.parts(trees),
        num_oversized=sum(tree.num_tokens > budget for tree in trees),
    )


def balance(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Divides items into parts of nearly equal cost; returns the indices of each part's items.

    Graham's LPT rule (1969) gives the items, in the order of falling cost, each to the lightest part. Then single moves
    and swaps lighten the heaviest part until it is within 0.1 % of the mean or no move or swap lightens it.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0.0] * num_parts
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = loads.index(min(loads))
        parts[lightest].append(item)
        loads[lightest] += costs[item]
    good_enough = 1.001 * sum(loads) / num_parts
    for _ in range(4 * len(costs)):
        if max(loads) <= good_enough or not _lighten(parts, loads, costs):
            break
    return parts


def _lighten(parts: list[list[int]], loads: list[float], costs: Sequence[float]) -> bool:
    """Lightens the heaviest part: moves an item to another part, or swaps it for an item there, whichever leaves the
    heavier of the two parts lightest. Returns False, and changes nothing, where no move or swap helps.
    """
    heavy = loads.index(max(loads))
    best: tuple[float, int, int, int | None] | None = None
    for other in range(len(parts)):
        gap = loads[heavy] - loads[other]
        for given in parts[heavy]:
            for taken in [None, *parts[other]]:
                change = costs[given] - (0.0 if taken is None else costs[taken])
                heavier = max(loads[heavy] - change, loads[other] + change)
                if 1e-9 * loads[heavy] < change < gap and (best is None or heavier < best[0]):
                    best = (heavier, other, given, taken)
    if best is None:
        return False
    _, other, given, taken = best
    _exchange(parts, heavy, other, given, taken)
    for part in (heavy, other):
        loads[part] = sum(costs[item] for item in parts[part])
    return True


def _exchange(parts: list[list[int]], heavy: int, other: int, given: int, taken: int | None) -> None:
    """Moves item `given` from the heavy part to the other one, and `taken`, where there is one, the other way."""
    parts[heavy].remove(given)
    parts[other].append(given)
    if taken is not None:
        parts[other].remove(taken)
        parts[heavy].append(taken)


def _first_fit(trees: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """Packs trees into micro-batches of at most `budget` tokens: longest first, each into the first micro-batch with
    room (first-fit decreasing).
    """
    bins: list[list[Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=lambda tree: -tree.num_tokens):
        place = next((i for i, left in enumerate(room) if tree.num_tokens <= left), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(tree)
        room[place] -= tree.num_tokens
    return bins


def _micro_batches(
    trees: Sequence[Tree], num_micro_batches: int, budget: int, costs: CostModel
) -> tuple[tuple[Tree, ...], ...]:
    """Packs a lane's trees into exactly `num_micro_batches` micro-batches, in the order of falling cost: lanes wait for
    each other in every micro-batch, so micro-batches of similar cost are aligned.
    """
    parts = [[trees[i] for i in part] for part in balance([costs.cost(tree) for tree in trees], num_micro_batches)]
    if any(len(part) > 1 and sum(tree.num_tokens for tree in part) > budget for part in parts):
        parts = _first_fit(trees, budget)
        parts += [[] for _ in range(num_micro_batches - len(parts))]
    parts.sort(key=lambda part: -sum(costs.cost(tree) for tree in part))
    return tuple(tuple(part) for part in parts)
