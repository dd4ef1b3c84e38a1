"""Lengths of pairs in numbers: percentiles, histograms, and length bias, in numpy alone."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PERCENTS = (0, 5, 25, 50, 75, 95, 99, 100)
NUM_BINS = 24  # maximum bins of a histogram; values beyond them are counted in `over`
NUM_GROUPS = 10  # groups of pairs by their difference in length
ROUND = (1, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50, 80)  # widths of bins, and their multiples by 100, 10,000, …


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, one value per pair (of `total`: two, or one where there are no losers)."""

    mean: float
    percentiles: tuple[int, ...]
    """At PERCENTS: the smallest value with at least that percentage of the values at or below it."""
    counts: tuple[int, ...]
    """Bin k counts the values from k `bin_width` up to and without (k + 1) `bin_width`."""
    over: int
    """Number of values after the last bin."""


@dataclass(frozen=True)
class SetLengths:
    """Lengths of the pairs of a set after truncation, EOS included. Every pair counts once."""

    bin_width: int
    """Tokens per bin, in all four histograms."""
    prompt: Lengths
    chosen: Lengths
    total: Lengths
    """Prompt and completion together, of both completions."""
    rejected: Lengths | None = None
    """None where the set has no losers."""


@dataclass(frozen=True)
class LengthGroup:
    """Pairs whose completions differ by `minimum` to `maximum` tokens, and the share of them whose longer completion
    wins.
    """

    minimum: int
    maximum: int
    pairs: int
    longer_wins: float


@dataclass(frozen=True)
class LengthBias:
    """How much of the preference is explained by length: pairs by whether the winner has more tokens than the loser."""

    winner_longer: int
    equal: int
    winner_shorter: int
    mean_difference: float
    """Mean of the winner's tokens minus the loser's."""
    groups: tuple[LengthGroup, ...]
    """The pairs of unequal length by the deciles of their difference; pairs with equal differences are in one group."""

    @property
    def pairs(self) -> int:
        """Returns the number of pairs."""
        return self.winner_longer + self.equal + self.winner_shorter

    @property
    def accuracy(self) -> float:
        """Returns the accuracy of the rule "the longer completion is better" over all pairs. A tie counts as wrong, as
        in the metrics.
        """
        return self.winner_longer / self.pairs

    @property
    def longer_share(self) -> float:
        """Returns the share of the pairs of unequal length whose winner is longer; 0.5 where there is no such pair."""
        unequal = self.winner_longer + self.winner_shorter
        return self.winner_longer / unequal if unequal else 0.5


def lengths_of(table: np.ndarray) -> SetLengths:
    """Returns the lengths of a set from `table`, shape (N, 3) with N >= 1: the tokens of prompt, winner and loser of
    each pair; (N, 2) where the set has no losers.
    """
    totals = (table[:, :1] + table[:, 1:]).ravel()
    maximum, percentile_99 = int(totals.max()), int(np.percentile(totals, 99, method="inverted_cdf"))
    width = bin_width(min(maximum, 2 * percentile_99))
    num_bins = min(NUM_BINS, maximum // width + 1)
    prompt, chosen, total, *rejected = (
        _summary(values, width, num_bins) for values in (*table.T[:2], totals, *table.T[2:])
    )
    return SetLengths(width, prompt, chosen, total, *rejected)


def bin_width(largest: int) -> int:
    """Returns the smallest round width for which NUM_BINS bins reach beyond `largest`."""
    widths: Iterator[int] = (width * 100**power for power in itertools.count() for width in ROUND)
    return next(width for width in widths if width * NUM_BINS > largest)


def _summary(values: np.ndarray, width: int, num_bins: int) -> Lengths:
    percentiles = np.percentile(values, PERCENTS, method="inverted_cdf")
    counts = np.bincount(np.minimum(values // width, num_bins), minlength=num_bins + 1)
    mean = float(values.mean(dtype=np.float64))
    return Lengths(mean, tuple(map(int, percentiles)), tuple(counts[:-1].tolist()), int(counts[-1]))


def length_bias(differences: np.ndarray) -> LengthBias:
    """Returns the length bias from `differences`, shape (N,): the tokens of each winner minus those of its loser."""
    sizes = np.abs(differences)
    unequal = sizes[sizes > 0]
    wins = differences[sizes > 0] > 0
    groups = []
    if len(unequal):
        edges = np.percentile(unequal, np.linspace(0, 100, NUM_GROUPS + 1)[1:], method="inverted_cdf")
        number = np.searchsorted(edges, unequal)  # group k: above the edge before, up to its own
        for k in np.unique(number):
            sizes_of_group = unequal[number == k]
            minimum, maximum = int(sizes_of_group.min()), int(sizes_of_group.max())
            groups.append(LengthGroup(minimum, maximum, len(sizes_of_group), float(wins[number == k].mean())))
    longer, shorter = int((differences > 0).sum()), int((differences < 0).sum())
    equal = len(differences) - longer - shorter
    return LengthBias(longer, equal, shorter, float(differences.mean()), tuple(groups))
