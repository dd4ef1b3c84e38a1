"""Which pairs a step trains on, and which rank computes what: pure functions of the seed, the step and the lengths.

The way through this file:

1. `PairOrder.items(step)`: the ids of the pairs of a step, a function of (seed, step) alone;
2. `grow_trees(pairs)`: pairs that share a prompt become one tree, in which shared completions stand once;
3. `plan_step(trees, ...)`: trees are balanced over the ranks by cost and packed into the same number of micro-batches
   on each of them. The gradient does not depend on this third stage: it is a scheduling decision.
"""

import functools
import math
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


# --- 1. the order ----------------------------------------------------------------------------------------------------


def _hashed(seed: int, epoch: int, num_items: int) -> np.ndarray:
    """A uint64 for each item from (seed, epoch, item): SplitMix64 of Steele, Lea and Flood (OOPSLA 2014).

    Written out so that a run can be resumed under another numpy, whose generators promise no stable streams.
    """
    with np.errstate(over="ignore"):
        state = np.arange(num_items, dtype=np.uint64)
        for salt in (seed, epoch, 0):
            state = state + np.uint64(salt % 2**64) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permutation(seed: int, epoch: int, num_items: int) -> np.ndarray:
    """The numbers 0 .. num_items - 1 in an order that depends on (seed, epoch) alone, shape (num_items,)."""
    return np.argsort(_hashed(seed, epoch, num_items), kind="stable")


@dataclass(frozen=True, eq=False)
class PairOrder:
    """The endless sequence of pair ids that a run trains on: epoch after epoch, a permutation of all pairs in each.

    `prompt_of_pair` (N,) holds the number of each pair's prompt, counted from 0. With `group_by_prompt` prompts are
    permuted instead of pairs, and the pairs of one stand together in file order.
    """

    prompt_of_pair: np.ndarray
    pairs_per_step: int
    seed: int = 0
    shuffled: bool = True
    group_by_prompt: bool = False

    @property
    def num_pairs(self) -> int:
        """Pairs of an epoch."""
        return len(self.prompt_of_pair)

    def steps_of(self, epochs: int) -> int:
        """Steps that see every pair `epochs` times; the last one may be partial."""
        return math.ceil(epochs * self.num_pairs / self.pairs_per_step)

    @functools.lru_cache(maxsize=2)  # noqa: B019  (an order lives as long as its run)
    def epoch(self, epoch: int) -> np.ndarray:
        """The pair ids of an epoch (from 0) in order, shape (num_pairs,)."""
        prompts = self.prompt_of_pair
        if not self.shuffled:
            return np.argsort(_first_seen(prompts), kind="stable") if self.group_by_prompt else np.arange(len(prompts))
        if not self.group_by_prompt:
            return permutation(self.seed, epoch, len(prompts))
        place_of_prompt = np.argsort(permutation(self.seed, epoch, int(prompts.max()) + 1))
        return np.argsort(place_of_prompt[prompts], kind="stable")

    def items(self, step: int, last_item: int | None = None) -> np.ndarray:
        """The pair ids of a step (from 1): places [n(s-1), ns) of the sequence, cut at `last_item` when that is
        given.
        """
        start, stop = (step - 1) * self.pairs_per_step, step * self.pairs_per_step
        places = np.arange(start, stop if last_item is None else min(stop, last_item))
        epochs, offsets = np.divmod(places, self.num_pairs)
        parts = [self.epoch(int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(parts) if parts else places


def _first_seen(prompts: np.ndarray) -> np.ndarray:
    """For each pair the place where its prompt was seen first."""
    _, first, inverse = np.unique(prompts, return_index=True, return_inverse=True)
    return first[inverse]


# --- 2. trees --------------------------------------------------------------------------------------------------------


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


# --- 3. the plan -----------------------------------------------------------------------------------------------------


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
