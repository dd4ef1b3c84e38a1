"""Lengths of pairs in numbers: percentiles, histograms, and how much of the preference is length. Pure numpy."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PERCENTS = (0, 5, 25, 50, 75, 95, 99, 100)
NUM_BINS = 24  # at most, of a histogram; what is beyond them is counted in `over`
NUM_GROUPS = 10  # of pairs by their difference in length
ROUND = (1, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50, 80)  # widths of bins; a hundred, ten thousand, … times as much too


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, one value a pair (of `total`: two)."""

    mean: float
    percentiles: tuple[int, ...]
    """At PERCENTS: the smallest value with at least so many percent of the values at or below it."""
    counts: tuple[int, ...]
    """Bin k counts the values from k to k + 1 times `bin_width`, the end excluded."""
    over: int
    """Values after the last bin."""


@dataclass(frozen=True)
class SetLengths:
    """Lengths of a set's pairs, every pair counted once, EOS included, as they are trained on (after truncation)."""

    bin_width: int
    """Tokens a bin, in all four histograms."""
    prompt: Lengths
    chosen: Lengths
    rejected: Lengths
    total: Lengths
    """Prompt and completion together, of both completions."""


@dataclass(frozen=True)
class LengthGroup:
    """Pairs whose completions differ by `least` to `most` tokens, and the share of them that the longer one wins."""

    least: int
    most: int
    pairs: int
    longer_wins: float


@dataclass(frozen=True)
class LengthBias:
    """How much of the preference is length: pairs by whether the winner has more tokens than the loser."""

    winner_longer: int
    equal: int
    winner_shorter: int
    mean_difference: float
    """Tokens of the winner less those of the loser."""
    groups: tuple[LengthGroup, ...]
    """The pairs of unequal length by the deciles of their difference; equal differences are never divided."""

    @property
    def pairs(self) -> int:
        return self.winner_longer + self.equal + self.winner_shorter

    @property
    def accuracy(self) -> float:
        """Of the rule "the longer completion is better" over all pairs; a tie counts as wrong, as in the metrics."""
        return self.winner_longer / self.pairs

    @property
    def longer_share(self) -> float:
        """Of the pairs of unequal length, those whose winner is the longer one; a half where no pair is unequal."""
        unequal = self.winner_longer + self.winner_shorter
        return self.winner_longer / unequal if unequal else 0.5


def lengths_of(table: np.ndarray) -> SetLengths:
    """From the tokens of prompt, winner and loser of each pair, (N, 3), N at least 1."""
    totals = (table[:, :1] + table[:, 1:]).ravel()
    most, nearly_most = int(totals.max()), int(np.percentile(totals, 99, method="inverted_cdf"))
    width = bin_width(min(most, 2 * nearly_most))
    num_bins = min(NUM_BINS, most // width + 1)
    return SetLengths(width, *(_summary(values, width, num_bins) for values in (*table.T, totals)))


def bin_width(largest: int) -> int:
    """The smallest round width of which NUM_BINS bins reach beyond `largest`."""
    widths: Iterator[int] = (width * 100**power for power in itertools.count() for width in ROUND)
    return next(width for width in widths if width * NUM_BINS > largest)


def _summary(values: np.ndarray, width: int, num_bins: int) -> Lengths:
    percentiles = np.percentile(values, PERCENTS, method="inverted_cdf")
    counts = np.bincount(np.minimum(values // width, num_bins), minlength=num_bins + 1)
    mean = float(values.mean(dtype=np.float64))
    return Lengths(mean, tuple(map(int, percentiles)), tuple(counts[:-1].tolist()), int(counts[-1]))


def length_bias(differences: np.ndarray) -> LengthBias:
    """From the tokens of each winner less those of its loser, (N,)."""
    sizes = np.abs(differences)
    unequal = sizes[sizes > 0]
    wins = differences[sizes > 0] > 0
    groups = []
    if len(unequal):
        edges = np.percentile(unequal, np.linspace(0, 100, NUM_GROUPS + 1)[1:], method="inverted_cdf")
        number = np.searchsorted(edges, unequal)  # group k: above the edge before, up to its own
        for k in np.unique(number):
            mine = unequal[number == k]
            groups.append(LengthGroup(int(mine.min()), int(mine.max()), len(mine), float(wins[number == k].mean())))
    longer, shorter = int((differences > 0).sum()), int((differences < 0).sum())
    equal = len(differences) - longer - shorter
    return LengthBias(longer, equal, shorter, float(differences.mean()), tuple(groups))
