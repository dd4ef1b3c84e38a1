"""How many pairs of a source an epoch has, and which: the same pairs in every epoch, chosen by their content.

An example: 5 kept pairs and `count: 13`. An epoch has every pair twice, and 3 pairs once more: those with the smallest
hashes of (seed, keys of the pair).

    pair     0   1   2   3   4
    hash    71  20  94  35  62
    times    2   3   2   3   3
"""

import hashlib

import numpy as np

from dpo.config import SourceConfig


def pairs_of_epoch(source: SourceConfig, num_kept: int) -> int:
    """Returns the number of pairs of a source that an epoch has.

    Args:
        source: gives `count`, or `weight`, or neither: then an epoch has every pair once.
        num_kept: the source's pairs after drops and hold-out; where there are none, an epoch has none.
    """
    if source.count is not None:
        return source.count if num_kept else 0
    return num_kept if source.weight is None else round(source.weight * num_kept)


def describe_share(source: SourceConfig) -> str:
    """Returns the key that gives a source's share of an epoch, and its value; "" where there is none."""
    if source.count is not None:
        return f"count {source.count:,}"
    return "" if source.weight is None else f"weight {source.weight:g}"


def times_in_epoch(keys: np.ndarray, num_pairs: int, seed: int) -> np.ndarray:
    """Returns how many times each pair of a source is in an epoch, (n,) int64: as many whole passes as fit, and one
    more time for the pairs with the smallest hashes.

    It depends on the seed and the pairs alone, not on the order of the file. Of pairs with equal keys the first ones
    are chosen.

    Args:
        keys: (n, 2) S16, the `completion_key` of winner and loser of each pair.
        num_pairs: the number of pairs of the source that an epoch has; 0 where n is 0.
        seed: `train.seed`.
    """
    times = np.zeros(len(keys), np.int64)
    if num_pairs:
        num_passes, rest = divmod(num_pairs, len(keys))
        times += num_passes
        times[_with_smallest(_hashes(keys, seed), rest) if rest else []] += 1
    return times


def _hashes(keys: np.ndarray, seed: int) -> np.ndarray:
    """Returns a hash of (seed, keys of the pair) of each pair, (n,) uint64."""
    content, secret, size = keys.tobytes(), str(seed).encode(), 2 * keys.dtype.itemsize
    pairs = (content[at : at + size] for at in range(0, len(content), size))
    hashed = (hashlib.blake2b(pair, key=secret, digest_size=8).digest() for pair in pairs)
    return np.fromiter((int.from_bytes(digest, "little") for digest in hashed), np.uint64, len(keys))


def _with_smallest(hashes: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the `count` smallest hashes, at least 1; of equal hashes the first ones."""
    largest = np.partition(hashes, count - 1)[count - 1]
    below = np.flatnonzero(hashes < largest)
    return np.concatenate([below, np.flatnonzero(hashes == largest)[: count - len(below)]])
