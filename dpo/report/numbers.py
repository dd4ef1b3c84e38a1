"""Numbers of single pairs: bins, correlation, calibration, means per source. numpy alone, pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo.report.record import Pairs

NUM_BINS = 40
"""Bins of a histogram."""
NUM_GROUPS = 10
"""Groups of pairs of equal size, by margin or by difference in length."""
NORMAL_95 = 1.96
"""The standard errors to each side that hold 95 % of a normal distribution."""
MOST_R = 1 - 1e-12
"""The correlation above which Fisher's z is that of this one: it is infinite at 1."""
TAIL = 0.5
"""Percentage of values at each end that may lie beyond the bins of a histogram, which are counted apart."""


@dataclass(frozen=True)
class Histogram:
    """The number of values in each bin."""

    edges: np.ndarray
    """(bins + 1,), rising."""
    counts: np.ndarray
    """(bins,); a value on an edge belongs to the bin above it, on the last edge to the last bin."""
    beyond: int
    """The number of values outside of the bins."""
    mean: float


@dataclass(frozen=True)
class Group:
    """Pairs of similar margin or difference in length."""

    pairs: int
    low: float
    high: float
    x: float
    """The mean of the first quantity."""
    y: float
    """The mean of the second quantity."""


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation of two quantities of P pairs, with its uncertainty."""

    r: float
    low: float
    high: float
    """The interval of 95 %, by Fisher's z."""
    pairs: int


@dataclass(frozen=True)
class Calibration:
    """Predicted and observed shares of right preferences, and what chance alone does to their differences.

    Chance is that of calibrated pairs: each is right with its predicted probability p, independently of the others.
    """

    groups: tuple[Group, ...]
    """Pairs of similar |margin|: the predicted (x) and the observed (y) share."""
    errors: tuple[float, ...]
    """The standard error of the observed share of each group."""
    predicted: float
    observed: float
    """The shares of all pairs together."""
    error: float
    """The standard error of `observed`: sqrt(sum of p (1 - p)) / P."""
    distance: float
    """The expected calibration error: the mean over pairs of |observed - predicted| of their group."""
    distance_by_chance: float
    """The mean of `distance` over draws of calibrated pairs: a group adds sqrt(2/pi) of its standard error."""
    pairs: int


@dataclass(frozen=True)
class SourceRow:
    """The means of the pairs of a source."""

    source: str
    pairs: int
    accuracy: float | None
    """None where the loss has no rewards; so for the next three."""
    margin: float | None
    chosen: float | None
    rejected: float | None
    tokens_chosen: float | None
    tokens_rejected: float | None
    """None where there are no losers."""


# --- histograms -------------------------------------------------------------------------------------------------------


def shared_edges(columns: Sequence[np.ndarray], num_bins: int = NUM_BINS) -> np.ndarray:
    """Returns the edges of bins of equal width for several columns together, (num_bins + 1,).

    They reach from the lowest to the highest value of any column without its tails (TAIL percent at each end), and
    half a unit to both sides of a single value.
    """
    low = min(float(np.percentile(column, TAIL)) for column in columns)
    high = max(float(np.percentile(column, 100 - TAIL)) for column in columns)
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-3):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, num_bins + 1)


def histogram(values: np.ndarray, edges: np.ndarray) -> Histogram:
    """Returns the number of values in each bin, of values that are at least one."""
    counts, _ = np.histogram(values, edges)
    return Histogram(edges, counts, len(values) - int(counts.sum()), float(values.mean(dtype=np.float64)))


# --- two quantities of a pair -----------------------------------------------------------------------------------------


def correlation(x: np.ndarray, y: np.ndarray) -> Correlation | None:
    """Returns Pearson's correlation; None of fewer than four pairs, and where one quantity is the same in all.

    Fisher's z, artanh(r), has the standard error 1 / sqrt(P - 3) for independent pairs.
    """
    pairs = len(x)
    if pairs < 4:
        return None
    x, y = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (x, y))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    if scale <= 1e-12 * pairs:
        return None
    r = float(x @ y) / scale
    z, half = math.atanh(min(max(r, -MOST_R), MOST_R)), NORMAL_95 / math.sqrt(pairs - 3)
    return Correlation(r, math.tanh(z - half), math.tanh(z + half), pairs)


def groups_by(by: np.ndarray, num_groups: int = NUM_GROUPS) -> list[np.ndarray]:
    """Returns the indices of the pairs of each group: nearly the same number of pairs, in the order of `by`.

    Pairs with equal `by` are in the same group, so that there may be fewer groups than `num_groups`.
    """
    order = np.argsort(by, kind="stable")
    ranked = by[order]
    wanted = np.arange(1, num_groups) * len(by) // num_groups
    cuts = np.unique(np.searchsorted(ranked, ranked[wanted[wanted < len(by)]]))
    return [part for part in np.split(order, cuts) if len(part)]


def grouped(x: np.ndarray, y: np.ndarray, by: np.ndarray, num_groups: int = NUM_GROUPS) -> list[Group]:
    """Returns the means of x and y in the groups of `groups_by`."""
    return [
        Group(
            len(part),
            float(by[part].min()),
            float(by[part].max()),
            float(x[part].mean(dtype=np.float64)),
            float(y[part].mean(dtype=np.float64)),
        )
        for part in groups_by(by, num_groups)
    ]


def thinned(count: int, most: int) -> np.ndarray:
    """Returns at most `most` of the indices 0 to count - 1, evenly spread; the same at every call."""
    if count <= most:
        return np.arange(count)
    return np.arange(most) * count // most


# --- calibration ------------------------------------------------------------------------------------------------------


def calibration(margins: np.ndarray, num_groups: int = NUM_GROUPS) -> Calibration:
    """Returns the predicted and the observed share of right preferences, in groups of rising |margin| and in all.

    Of two answers the policy prefers the one with the greater reward, by Bradley and Terry with probability
    sigmoid(|margin|): the predicted share. It is right where that answer is the winner: the observed share. A margin
    of 0 prefers neither and counts as half right, without chance.
    """
    size = np.abs(margins.astype(np.float64))
    predicted, observed = 1 / (1 + np.exp(-size)), (np.sign(margins) + 1) / 2
    variances = np.where(size > 0, predicted * (1 - predicted), 0.0)
    parts, pairs = groups_by(size, num_groups), len(margins)
    groups = tuple(grouped(predicted, observed, size, num_groups))
    deviations = [math.sqrt(variances[part].sum()) for part in parts]  # of the number of right pairs
    return Calibration(
        groups,
        errors=tuple(deviation / len(part) for deviation, part in zip(deviations, parts, strict=True)),
        predicted=float(predicted.mean()),
        observed=float(observed.mean(dtype=np.float64)),
        error=math.sqrt(variances.sum()) / pairs,
        distance=sum(group.pairs * abs(group.y - group.x) for group in groups) / pairs,
        distance_by_chance=math.sqrt(2 / math.pi) * sum(deviations) / pairs,
        pairs=pairs,
    )


# --- sources -----------------------------------------------------------------------------------------------


def margins_of(pairs: Pairs) -> np.ndarray | None:
    """Returns the reward margin of each pair, (P,); None where the loss has no rewards."""
    if "rewards_chosen" not in pairs or "rewards_rejected" not in pairs:
        return None
    margins: np.ndarray = pairs["rewards_chosen"] - pairs["rewards_rejected"]
    return margins


def by_source(pairs: Pairs) -> list[SourceRow]:
    """Returns the means of each source that has pairs, in the order of `sources`."""
    return [
        _row(str(name), pairs, pairs["source"] == number)
        for number, name in enumerate(pairs["sources"].tolist())
        if (pairs["source"] == number).any()
    ]


def _row(source: str, pairs: Pairs, mask: np.ndarray) -> SourceRow:
    """Returns the means of the pairs for which `mask` (P,) is true."""
    margins = margins_of(pairs)
    return SourceRow(
        source,
        pairs=int(mask.sum()),
        accuracy=_mean(None if margins is None else margins > 0, mask),
        margin=_mean(margins, mask),
        chosen=_mean(pairs.get("rewards_chosen"), mask),
        rejected=_mean(pairs.get("rewards_rejected"), mask),
        tokens_chosen=_mean(pairs.get("tokens_chosen"), mask),
        tokens_rejected=_mean(pairs.get("tokens_rejected"), mask),
    )


def _mean(column: np.ndarray | None, mask: np.ndarray) -> float | None:
    return None if column is None else float(column[mask].mean(dtype=np.float64))
