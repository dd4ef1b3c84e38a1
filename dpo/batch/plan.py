"""Which rank computes what of a step: pure functions of its pairs and their lengths.

The way through this file:

1. `grow_trees(pairs)`: pairs that share a prompt become one tree, in which shared completions stand once;
2. `plan_step(trees, ...)`: trees are balanced over the ranks by cost and packed into the same number of micro-batches
   on each of them. The gradient does not depend on this second stage: it is a scheduling decision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pair:
    """One preference as token ids, each a 1-D int32 array; the completions end as the model should end them."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray


@dataclass(frozen=True)
class Tree:
    """A prompt, the completions of it that a step needs (each once), and the (winner, loser) pairs among them."""

    prompt_ids: np.ndarray
    completion_ids: tuple[np.ndarray, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def num_scored(self) -> int:
        """Tokens of the completions: the rows that the head computes."""
        return sum(len(ids) for ids in self.completion_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that the body computes: the prompt once and every completion once."""
        return len(self.prompt_ids) + self.num_scored

    @property
    def num_attended(self) -> int:
        """(query, key) pairs that attention must look at: P(P+1)/2 in the prompt, C*P + C(C+1)/2 for each
        completion.
        """
        prompt = len(self.prompt_ids)
        return prompt * (prompt + 1) // 2 + sum(
            len(ids) * prompt + len(ids) * (len(ids) + 1) // 2 for ids in self.completion_ids
        )


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward pass: of one token in the body, one attended (query, key) pair, one row of the head."""

    per_token: float = 1.0
    per_attended: float = 0.0
    per_scored: float = 0.0
    per_token_last: float = 0.0
    """Of `per_token`: the last product of every layer, which activation checkpointing need not compute again."""

    def cost(self, tree: Tree) -> float:
        """FLOPs of the forward pass of one tree."""
        return (
            self.per_token * tree.num_tokens + self.per_attended * tree.num_attended + self.per_scored * tree.num_scored
        )


@dataclass(frozen=True)
class StepPlan:
    """The trees of one step by rank and micro-batch, `micro_batches[rank][micro]`, and the step's denominators.

    Every rank has the same number of micro-batches; an empty one is filled by one tree without pairs when it is packed.
    """

    micro_batches: tuple[tuple[tuple[Tree, ...], ...], ...]
    pairs_in_step: int
    winner_tokens_in_step: int
    forward_flops: float
    """What the cost model counts for one forward pass over all trees."""
    num_oversized: int

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each rank."""
        return len(self.micro_batches[0])


# --- 1. trees --------------------------------------------------------------------------------------------------------


def grow_trees(pairs: Sequence[Pair]) -> list[Tree]:
    """The trees of some pairs, in the order in which their prompts come first.

    Prompts are one when their ids are equal, and so are completions under one prompt. A pair that comes twice counts
    twice and runs once.
    """
    trunks: dict[bytes, np.ndarray] = {}
    branches: dict[bytes, dict[bytes, np.ndarray]] = {}
    marks: dict[bytes, list[tuple[bytes, bytes]]] = {}
    for pair in pairs:
        key, chosen, rejected = pair.prompt_ids.tobytes(), pair.chosen_ids.tobytes(), pair.rejected_ids.tobytes()
        trunks.setdefault(key, pair.prompt_ids)
        known = branches.setdefault(key, {})
        known.setdefault(chosen, pair.chosen_ids)
        known.setdefault(rejected, pair.rejected_ids)
        marks.setdefault(key, []).append((chosen, rejected))
    return [_tree(prompt_ids, branches[key], marks[key]) for key, prompt_ids in trunks.items()]


def _tree(prompt_ids: np.ndarray, completions: dict[bytes, np.ndarray], pairs: list[tuple[bytes, bytes]]) -> Tree:
    index = {key: number for number, key in enumerate(completions)}
    return Tree(prompt_ids, tuple(completions.values()), tuple((index[w], index[lo]) for w, lo in pairs))


# --- 2. the plan -----------------------------------------------------------------------------------------------------


def plan_step(trees: Sequence[Tree], num_ranks: int, tokens_per_micro_batch: int, costs: CostModel) -> StepPlan:
    """Balances trees over ranks by cost and packs them into micro-batches of at most `tokens_per_micro_batch` tokens.

    A tree with more tokens than that has a micro-batch of its own. Every tree stands in exactly one place.
    """
    budget = tokens_per_micro_batch
    by_rank = [[trees[i] for i in part] for part in balance([costs.cost(tree) for tree in trees], num_ranks)]
    num_micro_batches = max(1, *(len(_first_fit(part, budget)) for part in by_rank))
    return StepPlan(
        micro_batches=tuple(_micro_batches(part, num_micro_batches, budget, costs) for part in by_rank),
        pairs_in_step=sum(len(tree.pairs) for tree in trees),
        winner_tokens_in_step=sum(len(tree.completion_ids[w]) for tree in trees for w, _ in tree.pairs),
        forward_flops=sum(costs.cost(tree) for tree in trees),
        num_oversized=sum(tree.num_tokens > budget for tree in trees),
    )


def balance(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Divides items into parts of nearly equal cost: longest first to the lightest part, then moves and swaps.

    Graham's LPT rule (1969), then local search on the heaviest part until it is within 0.1 % of the mean or cannot be
    lightened.
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
    """One move or swap that lowers the heaviest part's load the most while its partner stays below it."""
    heavy = loads.index(max(loads))
    best: tuple[float, int, int, int | None] | None = None
    for other in range(len(parts)):
        gap = loads[heavy] - loads[other]
        for mine in parts[heavy]:
            for theirs in [None, *parts[other]]:
                change = costs[mine] - (0.0 if theirs is None else costs[theirs])
                worst = max(loads[heavy] - change, loads[other] + change)
                if 1e-9 * loads[heavy] < change < gap and (best is None or worst < best[0]):
                    best = (worst, other, mine, theirs)
    if best is None:
        return False
    _, other, mine, theirs = best
    _exchange(parts, heavy, other, mine, theirs)
    for part in (heavy, other):
        loads[part] = sum(costs[item] for item in parts[part])
    return True


def _exchange(parts: list[list[int]], heavy: int, other: int, mine: int, theirs: int | None) -> None:
    parts[heavy].remove(mine)
    parts[other].append(mine)
    if theirs is not None:
        parts[other].remove(theirs)
        parts[heavy].append(theirs)


def _first_fit(trees: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """Micro-batches within the budget: longest first into the first that has room (first-fit decreasing)."""
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
    """One rank's trees in exactly `num_micro_batches`, the dearest first: the ranks wait for each other in each one."""
    parts = [[trees[i] for i in part] for part in balance([costs.cost(tree) for tree in trees], num_micro_batches)]
    if any(len(part) > 1 and sum(tree.num_tokens for tree in part) > budget for part in parts):
        parts = _first_fit(trees, budget)
        parts += [[] for _ in range(num_micro_batches - len(parts))]
    parts.sort(key=lambda part: -sum(costs.cost(tree) for tree in part))
    return tuple(tuple(part) for part in parts)
