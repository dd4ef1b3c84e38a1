"""Which pairs a step trains on: a function of the seed and the step alone.

Epochs follow each other in one endless sequence of pair ids, and each step takes the next `pairs_per_step` of them. An
example: 5 pairs, 2 per step, seed 0. Step 3 trains on the last pair of epoch 0 and the first pair of epoch 1.

    epoch      0  0  0  0  0    1  1  1  1  1
    place      0  1  2  3  4    5  6  7  8  9
    pair id    2  0  3  4  1    1  3  4  0  2
    step       1  1  2  2  3    3  4  4  5  5

An epoch is the pairs sorted by a hash of (seed, epoch, pair), their key. It is never sorted as a whole, so that memory
does not grow with the number of pairs. A first pass over the keys counts them in 65,536 buckets by their first 16 bits.
To compute the 65,536 places of a window, another pass collects the pairs of the buckets that the window reaches, and
these are sorted. An example with 10 pairs, 4 buckets and windows of 4 places:

    pairs in buckets 0 to 3         2  3  3  2
    running sum (`_bucket_ends`)    2  5  8  10
    window 1 has places 4 to 7      it reaches bucket 1 (places 2 to 4) and bucket 2 (places 5 to 7)
    their pairs, sorted by key      3  9  4  7  5  1
    without places 2 and 3          4  7  5  1
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dpo.base.arrays import DiskArray
from dpo.config import Config
from dpo.pairs.prepare import PreferenceData
from dpo.pairs.report import check_enough

WINDOW = 2**16
"""Places of an epoch whose pair ids are computed together; memory holds the ids of a few windows, not of an epoch."""

NUM_BUCKETS = 2**16
"""Equal ranges of keys in which the pairs of an epoch are counted."""


def _hashed(seed: int, epoch: int, items: np.ndarray) -> np.ndarray:
    """Returns a uint64 hash of (seed, epoch, item) per item, a different one for each item of an epoch: SplitMix64 of
    Steele, Lea and Flood (OOPSLA 2014).

    It is written out here so that a run can be resumed with another version of numpy, whose generators may change their
    streams from version to version.
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
    """The endless sequence of pair ids that a run trains on: epoch after epoch, each a permutation of all N pairs.

    `prompt_of_pair` (N,) holds the number of each pair's prompt, from 0 by first appearance. With `group_by_prompt`
    prompts are permuted instead of pairs, and the pairs of a prompt stand together in file order. Without `shuffled`
    pairs, or prompts, are in file order.
    """

    prompt_of_pair: np.ndarray | DiskArray
    pairs_per_step: int
    seed: int = 0
    shuffled: bool = True
    group_by_prompt: bool = False

    @property
    def num_pairs(self) -> int:
        """Returns the pairs of an epoch, N."""
        return len(self.prompt_of_pair)

    def steps_of(self, epochs: int) -> int:
        """Returns the number of steps that see every pair `epochs` times; the last step may be partial."""
        return math.ceil(epochs * self.num_pairs / self.pairs_per_step)

    def items(self, step: int, last_item: int | None = None) -> np.ndarray:
        """Returns the pair ids of step s (from 1): places [n(s-1), ns) of the sequence for n pairs per step, cut at
        place `last_item` where it is given.
        """
        start, stop = (step - 1) * self.pairs_per_step, step * self.pairs_per_step
        return self.between(start, stop if last_item is None else min(stop, last_item))

    def between(self, start: int, stop: int) -> np.ndarray:
        """Returns the pair ids at places [start, stop) of the sequence, int64."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, place = divmod(start, self.num_pairs)
            window, offset = divmod(place, WINDOW)
            parts.append(self._window(epoch, window)[offset : offset + stop - start])
            assert len(parts[-1])
            start += len(parts[-1])
        return np.concatenate(parts)

    @functools.lru_cache(maxsize=4)  # noqa: B019  (an order lives as long as its run)
    def _window(self, epoch: int, number: int) -> np.ndarray:
        """Returns the pair ids at places [WINDOW * number, WINDOW * (number + 1)) of an epoch: finds the pairs in the
        buckets that these places reach, sorts them by key, and cuts both ends.
        """
        first, last = WINDOW * number, min(WINDOW * (number + 1), self.num_pairs)
        if not (self.shuffled or self.group_by_prompt):
            return np.arange(first, last)
        ends = self._bucket_ends(epoch)
        low, high = np.searchsorted(ends, [first, last - 1], side="right")
        ids, sort_keys = [], []
        for start, keys, buckets in self._keys(epoch):
            chosen = np.flatnonzero((buckets >= low) & (buckets <= high))
            ids.append(start + chosen)
            sort_keys.append(keys[chosen])
        before = int(ends[low - 1]) if low else 0
        order = np.argsort(np.concatenate(sort_keys), kind="stable")
        return np.concatenate(ids)[order[first - before : last - before]]

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _bucket_ends(self, epoch: int) -> np.ndarray:
        """Returns, per bucket, how many pairs have their key in it or in an earlier bucket, (NUM_BUCKETS,)."""
        return np.cumsum(sum(np.bincount(buckets, minlength=NUM_BUCKETS) for _, _, buckets in self._keys(epoch)))

    def _keys(self, epoch: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields (first pair, keys, buckets) of up to WINDOW pairs at a time: the keys to sort by, uint64, and their
        first bits, the number of a bucket.

        Only pairs of the same prompt can have equal keys, since different items have different hashes.
        """
        num_bits = 64 if self.shuffled else self.num_pairs.bit_length()
        shift = max(0, num_bits - (NUM_BUCKETS.bit_length() - 1))
        for start in range(0, self.num_pairs, WINDOW):
            stop = min(start + WINDOW, self.num_pairs)
            items = self.prompt_of_pair[start:stop] if self.group_by_prompt else np.arange(start, stop)
            keys = _hashed(self.seed, epoch, items) if self.shuffled else items.astype(np.uint64)
            yield start, keys, (keys >> np.uint64(shift)).astype(np.int64)


def make_order(config: Config, data: PreferenceData) -> tuple[PairOrder, int, int | None]:
    """Returns the order of pairs, the last step, and the place in the sequence at which the last step is cut, or None
    where every step is whole.

    Raises UserError where an epoch has fewer pairs than a step takes, or none of a source that has a share.
    """
    check_enough(data.report, config.batch.pairs_per_step)
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
