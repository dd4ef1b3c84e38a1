"""Trees and their plan: every pair exactly once, whatever the number of ranks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from dpo.batch.costs import CostModel, cost_model
from dpo.batch.order import PairOrder
from dpo.batch.plan import StepPlan, balance, plan_step
from dpo.batch.trees import Tree, grow_trees
from dpo.pairs.pair_set import Pair
from dpo.pairs.prepare import prepare_data
from tests.support.runs import make_config

COSTS = CostModel(per_token=3.0, per_attended=0.01, per_scored=2.0)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


@st.composite
def step_pairs(draw: st.DrawFn) -> list[Pair]:
    """1 to 40 pairs over few prompts and completions, so that both are shared, and pairs come twice."""
    prompts = [ids(p, *range(draw(st.integers(0, 30)))) for p in range(draw(st.integers(1, 8)))]
    answers = [ids(a, *range(draw(st.integers(0, 25)))) for a in range(draw(st.integers(2, 5)))]
    one = st.tuples(st.sampled_from(prompts), st.permutations(answers))
    return [Pair(prompt, order[0], order[1]) for prompt, order in draw(st.lists(one, min_size=1, max_size=40))]


def pair_counts(plan: StepPlan) -> Counter[tuple[bytes, bytes, bytes]]:
    """How often each (prompt, winner, loser) stands in a plan."""
    return Counter(
        (tree.prompt_ids.tobytes(), tree.completion_ids[w].tobytes(), tree.completion_ids[lo].tobytes())
        for tree in all_trees(plan)
        for w, lo in tree.pairs
    )


def all_trees(plan: StepPlan) -> list[Tree]:
    return [tree for rank in plan.micro_batches for trees in rank for tree in trees]


def as_text(plan: StepPlan) -> str:
    return str([[[(t.prompt_ids.tolist(), t.pairs) for t in trees] for trees in rank] for rank in plan.micro_batches])


# --- the plan of a step ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(step_pairs(), st.integers(1, 48), st.sampled_from([1, 40, 100, 10_000]))
def test_a_plan_holds_every_pair_once_and_keeps_the_budget(pairs: list[Pair], num_ranks: int, budget: int) -> None:
    """Nothing lost or doubled, no tree in two places, only a tree that alone is too long over the budget; each rank has
    the same number of micro-batches, also where there are more ranks than trees.
    """
    plan = plan_step(grow_trees(pairs), num_ranks, budget, COSTS)
    wanted = Counter((p.prompt_ids.tobytes(), p.chosen_ids.tobytes(), p.rejected_ids.tobytes()) for p in pairs)
    assert pair_counts(plan) == wanted
    prompts = [tree.prompt_ids.tobytes() for tree in all_trees(plan)]
    assert len(prompts) == len(set(prompts))
    assert len(plan.micro_batches) == num_ranks
    assert {len(rank) for rank in plan.micro_batches} == {plan.num_micro_batches}
    over = [trees for rank in plan.micro_batches for trees in rank if sum(t.num_tokens for t in trees) > budget]
    assert all(len(trees) == 1 for trees in over)
    assert plan.num_oversized == len(over)
    assert plan.pairs_in_step == len(pairs)
    assert plan.winner_tokens_in_step == sum(len(pair.chosen_ids) for pair in pairs)


def tree_of(num_tokens: int, number: int) -> Tree:
    """A tree of so many tokens, at least 3, whose prompt begins with its number."""
    return Tree(ids(number, *range(num_tokens - 3)), (ids(1), ids(2)), ((0, 1),))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(3, 30), min_size=6, max_size=40), st.integers(1, 3), st.integers(20, 60))
def test_tight_micro_batches_keep_the_budget(sizes: list[int], num_ranks: int, budget: int) -> None:
    """Many trees that fill their micro-batches nearly to the brim, where a balanced split alone would spill over."""
    trees = [tree_of(size, number) for number, size in enumerate(sizes)]
    plan = plan_step(trees, num_ranks, budget, COSTS)
    assert sorted(tree.prompt_ids[0] for tree in all_trees(plan)) == list(range(len(sizes)))
    for trees_of_one in (trees for rank in plan.micro_batches for trees in rank):
        assert len(trees_of_one) <= 1 or sum(tree.num_tokens for tree in trees_of_one) <= budget


@settings(max_examples=40, deadline=None)
@given(step_pairs(), st.integers(1, 12), st.integers(1, 200))
def test_a_plan_is_a_function_of_its_inputs(pairs: list[Pair], num_ranks: int, budget: int) -> None:
    """Every rank makes the plan by itself, so all must make the same one."""
    plans = [plan_step(grow_trees(pairs), num_ranks, budget, COSTS) for _ in range(2)]
    assert as_text(plans[0]) == as_text(plans[1])


def test_no_micro_batch_more_than_needed() -> None:
    """Six trees of 10 tokens on two ranks with a budget of 20: three trees a rank, two micro-batches each (20 + 10)."""
    pairs = [Pair(ids(p, *range(5)), ids(1, 2), ids(3, 4)) for p in range(6)]
    plan = plan_step(grow_trees(pairs), 2, 20, CostModel())
    assert [[len(trees) for trees in rank] for rank in plan.micro_batches] == [[2, 1], [2, 1]]


def test_more_ranks_than_pairs_leaves_empty_micro_batches() -> None:
    pairs = [Pair(ids(p), ids(1), ids(2)) for p in range(2)]
    plan = plan_step(grow_trees(pairs), 5, 100, CostModel())
    assert [[len(trees) for trees in rank] for rank in plan.micro_batches] == [[1], [1], [0], [0], [0]]


def test_balance_by_hand() -> None:
    """Costs 7, 6, 5, 4, 3, 3 on two parts: longest first gives 7+4+3 = 14 and 6+5+3 = 14, the best there is. Costs 3,
    3, 2, 2, 2: longest first gives 3+2+2 = 7 and 3+2 = 5, and one swap (a 3 for a 2) gives 6 and 6.
    """
    for costs in ([7, 6, 5, 4, 3, 3], [3, 3, 2, 2, 2]):
        parts = balance(costs, 2)
        assert sorted(i for part in parts for i in part) == list(range(len(costs)))
        assert {sum(costs[i] for i in part) for part in parts} == {sum(costs) / 2}


@pytest.fixture(scope="module")
def hh_steps(shared_data: Path) -> list[list[float]]:
    """The costs of the trees of 28 steps of 64 pairs: an epoch of the shared HH file, for the stories260K model."""
    folder = shared_data / "stories260K"
    config = make_config(folder, shared_data / "hh" / "public-0000-1799.jsonl.gz", "unused")
    model = AutoConfig.from_pretrained(folder)
    data, costs = prepare_data(config, model).train, cost_model(model)
    order = PairOrder(data.prompt_of_pair, 64)
    return [[costs.cost(tree) for tree in grow_trees(data.pairs(order.items(step)))] for step in range(1, 29)]


@pytest.mark.parametrize(("num_ranks", "bound"), [(8, 1.02), (16, 1.10)])
def test_ranks_are_balanced_on_real_pairs(hh_steps: list[list[float]], num_ranks: int, bound: float) -> None:
    """At every step the dearest rank has at most `bound` times the mean cost."""
    for costs in hh_steps:
        loads = [sum(costs[i] for i in part) for part in balance(costs, num_ranks)]
        assert max(loads) <= bound * sum(loads) / num_ranks


def test_cost_of_a_tree_by_hand() -> None:
    """Prompt 3, completions 2 and 4: 9 tokens; attended 3*4/2 + (2*3 + 2*3/2) + (4*3 + 4*5/2) = 6 + 9 + 22 = 37;
    scored 6; with costs (2, 10, 100): 18 + 370 + 600 = 988.
    """
    tree = Tree(ids(1, 2, 3), (ids(1, 2), ids(1, 2, 3, 4)), ((0, 1),))
    assert (tree.num_tokens, tree.num_attended, tree.num_scored) == (9, 37, 6)
    assert CostModel(2, 10, 100).cost(tree) == 988


# --- trees -----------------------------------------------------------------------------------------------------------


def test_trees_share_prompts_and_completions() -> None:
    """Four pairs of prompt P among answers A, B, C, one of them twice, and one of prompt Q which also has an answer
    A: P is one tree with three completions; the pair that comes twice is listed twice, its completions stand there
    once.
    """
    p, q, a, b, c = ids(1, 2), ids(1, 3), ids(7, 2), ids(8, 2), ids(9, 9, 2)
    pairs = [Pair(p, a, b), Pair(q, a, c), Pair(p, c, a), Pair(p, a, b), Pair(p.copy(), b.copy(), c.copy())]
    first, second = grow_trees(pairs)
    assert [list(x) for x in first.completion_ids] == [[7, 2], [8, 2], [9, 9, 2]]
    assert first.pairs == ((0, 1), (2, 0), (0, 1), (1, 2))
    assert [list(x) for x in second.completion_ids] == [[7, 2], [9, 9, 2]]
    assert second.pairs == ((0, 1),)


def test_a_prompt_that_begins_another_is_not_it() -> None:
    assert len(grow_trees([Pair(ids(1), ids(2), ids(3)), Pair(ids(1, 2), ids(2), ids(3))])) == 2
