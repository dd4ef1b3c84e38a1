"""Which pairs a step trains on: a function of the seed and the step alone."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dpo.base.arrays import DiskArray
from dpo.config import Config
from dpo.data.prepare import PreferenceData

WINDOW = 2**16
"""Places of an epoch that are worked out together: memory holds so many pair ids, not all."""

NUM_BUCKETS = 2**16
"""Ranges of keys in which the pairs of an epoch are counted."""


def _hashed(seed: int, epoch: int, items: np.ndarray) -> np.ndarray:
    """A uint64 for each item from (seed, epoch, item), another for each: SplitMix64 of Steele, Lea and Flood (OOPSLA
    2014).

    Written out so that a run can be resumed under another numpy, whose generators promise no stable streams.
    """
    with np.errstate(over="ignore"):
        state = items.astype(np.uint64)
        for salt in (seed, epoch, 0):
            state = state + np.uint64(salt % 2**64) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


@dataclass(frozen=True, eq=False)
class PairOrder:
    """The endless sequence of pair ids that a run trains on: epoch after epoch, a permutation of all pairs in each, in
    which they are sorted by a hash of (seed, epoch, pair).

    `prompt_of_pair` (N,) holds the number of each pair's prompt, from 0 by first appearance; an array, or what gives
    arrays when it is sliced. With `group_by_prompt` prompts are permuted instead of pairs, and the pairs of one stand
    together in file order.
    """

    prompt_of_pair: np.ndarray | DiskArray
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

    def items(self, step: int, last_item: int | None = None) -> np.ndarray:
        """The pair ids of a step (from 1): places [n(s-1), ns) of the sequence, cut at `last_item` when that is
        given.
        """
        start, stop = (step - 1) * self.pairs_per_step, step * self.pairs_per_step
        return self.between(start, stop if last_item is None else min(stop, last_item))

    def between(self, start: int, stop: int) -> np.ndarray:
        """The pair ids at places [start, stop) of the sequence."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, place = divmod(start, self.num_pairs)
            number, offset = divmod(place, WINDOW)
            parts.append(self._window(epoch, number)[offset : offset + stop - start])
            assert len(parts[-1])
            start += len(parts[-1])
        return np.concatenate(parts)

    @functools.lru_cache(maxsize=4)  # noqa: B019  (an order lives as long as its run)
    def _window(self, epoch: int, number: int) -> np.ndarray:
        """The pair ids at places [WINDOW * number, WINDOW * (number + 1)) of an epoch: those whose keys are in a range
        are found, and sorted.
        """
        first, last = WINDOW * number, min(WINDOW * (number + 1), self.num_pairs)
        if not (self.shuffled or self.group_by_prompt):
            return np.arange(first, last)
        ends = self._bucket_ends(epoch)
        low, high = np.searchsorted(ends, [first, last - 1], side="right")
        ids, found = [], []
        for start, keys, buckets in self._keys(epoch):
            chosen = np.flatnonzero((buckets >= low) & (buckets <= high))
            ids.append(start + chosen)
            found.append(keys[chosen])
        before = int(ends[low - 1]) if low else 0
        order = np.argsort(np.concatenate(found), kind="stable")
        return np.concatenate(ids)[order[first - before : last - before]]

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _bucket_ends(self, epoch: int) -> np.ndarray:
        """How many pairs have their key in each bucket or one before it, (NUM_BUCKETS,)."""
        return np.cumsum(sum(np.bincount(buckets, minlength=NUM_BUCKETS) for _, _, buckets in self._keys(epoch)))

    def _keys(self, epoch: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first pair, keys, buckets) of many pairs at a time: what they are sorted by, uint64, and its first bits.

        Equal keys are those of one prompt's pairs, for the hash of another item is another.
        """
        num_bits = 64 if self.shuffled else self.num_pairs.bit_length()
        shift = max(0, num_bits - (NUM_BUCKETS.bit_length() - 1))
        for start in range(0, self.num_pairs, WINDOW):
            stop = min(start + WINDOW, self.num_pairs)
            items = self.prompt_of_pair[start:stop] if self.group_by_prompt else np.arange(start, stop)
            keys = _hashed(self.seed, epoch, items) if self.shuffled else items.astype(np.uint64)
            yield start, keys, (keys >> np.uint64(shift)).astype(np.int64)


def make_order(config: Config, data: PreferenceData) -> tuple[PairOrder, int, int | None]:
    """The order of pairs, the number of the last step, and the place in the sequence where the last step ends."""
    order = PairOrder(
        data.train.prompt_of_pair,
        config.batch.pairs_per_step,
        config.train.seed,
        shuffled=config.data.order == "shuffled",
        group_by_prompt=config.batch.group_by_prompt,
    )
    if config.train.steps is not None:
        return order, config.train.steps, None
    epochs = config.train.epochs or 1
    return order, order.steps_of(epochs), epochs * order.num_pairs
