"""The order of pairs: every one once an epoch, a function of (seed, step) that needs no list of all of them."""

import dataclasses
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.batch import order as module
from dpo.batch.order import PairOrder

MASK = 2**64 - 1


def epoch_of(order: PairOrder, epoch: int = 0) -> list[int]:
    """The pair ids of an epoch in order."""
    return order.between(epoch * order.num_pairs, (epoch + 1) * order.num_pairs).tolist()


def splitmix64(state: int) -> tuple[int, int]:
    """(next state, output) of the public-domain reference: https://prng.di.unimi.it/splitmix64.c (Vigna 2015)."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def test_the_oracle_gives_the_known_values_of_splitmix64() -> None:
    """The first outputs for state 1234567, as printed in the test vectors that implementations share (Rosetta Code)."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    state, found = 1234567, []
    for _ in known:
        state, output = splitmix64(state)
        found.append(output)
    assert found == known


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (2**63 + 5, 3)])
def test_the_permutation_is_that_of_splitmix64(seed: int, epoch: int) -> None:
    """Items sorted by SplitMix64 of (item, seed, epoch): state = item, then a salted step for each of seed, epoch, 0.
    So a run can be resumed under any numpy.
    """

    def key(item: int) -> int:
        for salt in (seed, epoch, 0):
            item = splitmix64((item + salt * 0xD1342543DE82EF95) & MASK)[1]
        return item

    assert epoch_of(PairOrder(np.arange(200), 64, seed), epoch) == sorted(range(200), key=key)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 2**64 - 1), st.booleans(), st.booleans())
def test_steps_run_through_epochs(num: int, per_step: int, seed: int, shuffled: bool, grouped: bool) -> None:
    """Step s takes items [n(s-1), ns) of epoch after epoch, each a permutation of all pairs."""
    per_step = min(per_step, num)
    order = PairOrder(np.arange(num) // 3, per_step, seed, shuffled, grouped)
    steps = [order.items(step) for step in range(1, 3 * num + 2)]
    assert all(len(step) == per_step for step in steps)
    sequence = np.concatenate(steps)
    for epoch in range(3):
        part = sequence[epoch * num : (epoch + 1) * num]
        assert sorted(part) == list(range(num))


def test_the_last_step_of_epochs_is_partial() -> None:
    """2 epochs of 10 pairs by 8: ceil(20 / 8) = 3 steps of 8, 8 and 4; the second crosses the epochs' border."""
    order = PairOrder(np.arange(10), 8, seed=3)
    assert order.steps_of(2) == 3
    steps = [order.items(step, last_item=20) for step in (1, 2, 3)]
    assert [len(step) for step in steps] == [8, 8, 4]
    assert Counter(np.concatenate(steps).tolist()) == dict.fromkeys(range(10), 2)
    assert len(order.items(4, last_item=20)) == 0


def test_sequential_is_file_order() -> None:
    order = PairOrder(np.arange(5), 4, shuffled=False)
    assert [order.items(step).tolist() for step in (1, 2, 3)] == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]


PROMPTS = np.array([0, 1, 0, 2, 1, 0, 3, 2, 4, 4])


def test_sequential_and_grouped_puts_pairs_where_their_prompt_came_first() -> None:
    order = PairOrder(PROMPTS, 10, shuffled=False, group_by_prompt=True)
    assert order.items(1).tolist() == [0, 2, 5, 1, 4, 3, 7, 6, 8, 9]


@pytest.mark.parametrize("seed", range(5))
def test_group_by_prompt_keeps_prompts_together_in_file_order(seed: int) -> None:
    """The prompts come in a permutation, their pairs follow one another, rising."""
    order = np.array(epoch_of(PairOrder(PROMPTS, 4, seed, group_by_prompt=True)))
    prompts = PROMPTS[order]
    starts = np.flatnonzero(np.diff(prompts, prepend=-1))
    assert len(starts) == 5  # as many runs as prompts
    assert all((np.diff(part) > 0).all() for part in np.split(order, starts[1:]))


def test_group_by_prompt_permutes_the_prompts() -> None:
    orders = {tuple(epoch_of(PairOrder(PROMPTS, 4, seed, group_by_prompt=True))) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_depends_on_seed_and_epoch(grouped: bool) -> None:
    order = PairOrder(np.arange(64), 8, 1, group_by_prompt=grouped)
    again = dataclasses.replace(order)
    assert epoch_of(order) == epoch_of(again)
    assert epoch_of(order) != epoch_of(order, 1)
    assert epoch_of(order) != epoch_of(dataclasses.replace(order, seed=2))


def test_places_of_a_pair_are_uniform() -> None:
    """Pair 0 of 8 over 4,000 seeds: 500 times in each place, within 5 standard deviations, 5 sqrt(4000/8 * 7/8) =
    105.
    """
    places = Counter(epoch_of(PairOrder(np.arange(8), 8, seed)).index(0) for seed in range(4000))
    assert all(abs(places[place] - 500) < 5 * math.sqrt(4000 / 8 * 7 / 8) for place in range(8))


# --- in windows ------------------------------------------------------------------------------------------------------


def plain_epoch(prompts: np.ndarray, seed: int, epoch: int, shuffled: bool, grouped: bool) -> list[int]:
    """The oracle: all pairs sorted in one go by the hash of what is permuted, prompts or pairs; ties in file order."""
    ids = np.arange(len(prompts))
    items = prompts if grouped else ids
    keys = module._hashed(seed, epoch, items) if shuffled else items
    return ids[np.argsort(keys, kind="stable")].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.integers(3, 40), st.integers(0, 9), st.booleans(), st.booleans(), st.data())
def test_windows_together_are_the_whole(
    num: int, window: int, seed: int, shuffled: bool, grouped: bool, data: st.DataObject
) -> None:
    """Windows of any size give what one sort of all pairs gives, also where a window's border parts a prompt's pairs,
    and where pieces are asked for in any order and across epochs.
    """
    step = data.draw(st.integers(1, 5))
    prompts = np.arange(num) // step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", window)
        patch.setattr(module, "NUM_BUCKETS", data.draw(st.sampled_from([1, 4, 256])))
        order = PairOrder(prompts, 1, seed, shuffled, grouped)
        wanted = [i for epoch in range(2) for i in plain_epoch(prompts, seed, epoch, shuffled, grouped)]
        for _ in range(3):
            start = data.draw(st.integers(0, 2 * num))
            stop = data.draw(st.integers(start, 2 * num))
            assert order.between(start, stop).tolist() == wanted[start:stop]


@pytest.mark.parametrize("grouped", [False, True])
def test_memory_does_not_grow_with_the_pairs(grouped: bool) -> None:
    """Eight times the pairs may take a few windows more, 2**16 numbers of 8 bytes each, and never 8 bytes a pair."""

    class Prompts:
        """Two pairs a prompt; holds none of them."""

        def __init__(self, num: int):
            self.num = num

        def __len__(self) -> int:
            return self.num

        def __getitem__(self, index: slice) -> np.ndarray:
            return np.arange(index.start, index.stop) // 2

    def peak(num: int) -> int:
        order = PairOrder(Prompts(num), 64, group_by_prompt=grouped)
        tracemalloc.start()
        order.items(1)
        order.items(num // 64 + 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(2**23) < peak(2**20) + 4 * 8 * 2**16
