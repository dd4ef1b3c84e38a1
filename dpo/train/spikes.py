"""Loss spikes: a step whose loss is far above those before it. A pure function of the losses in metrics.jsonl.

A loss is a spike where it is more than SIGMAS standard deviations above the mean of the last WINDOW losses, of which
there must be FEWEST. How often that happens without cause, in sigma of the window:

    a straight line, rising by d per step    sqrt(3 (n + 1) / (n - 1)) for n losses: 1.79 for 32, 1.75 for 128; never
    normally distributed losses              once in 80 million steps with 128 losses before them, in 10^6 with 32
    a level that rises once, by any height   at most 4 steps: (1 - p) / p > 36 for the p = k / 128 of higher losses

Losses that are all equal have a sigma of 0; a rise by rounding is none: see ROUNDING.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WINDOW = 128
FEWEST = 32
SIGMAS = 6
ROUNDING = 1e-6
"""The least sigma, as a part of the mean."""


@dataclass(frozen=True)
class Spike:
    """A loss that is far above those before it."""

    loss: float
    mean: float
    sigma: float
    """The standard deviation of the losses before it."""
    count: int
    """How many they are."""

    def __str__(self) -> str:
        above = f"{(self.loss - self.mean) / self.sigma:.1f} sigma above the mean of the last {self.count}"
        return f"the loss {self.loss:.4g} is {above}, {self.mean:.4g}, with a sigma of {self.sigma:.2g}"


def find_spike(before: Sequence[float], loss: float) -> Spike | None:
    """Returns the spike that a loss is; None where it is none.

    Args:
        before: the losses of the steps before, in order; only the last WINDOW count.
        loss: a step's `train/loss`.
    """
    last = before[-WINDOW:]
    if len(last) < FEWEST:
        return None
    mean = math.fsum(last) / len(last)
    sigma = math.sqrt(math.fsum((each - mean) ** 2 for each in last) / len(last))
    sigma = max(sigma, ROUNDING * abs(mean))
    return Spike(loss, mean, sigma, len(last)) if loss - mean > SIGMAS * sigma else None


def losses_of(lines: Sequence[Mapping[str, float]]) -> list[float]:
    """Returns the losses of the last WINDOW lines of metrics.jsonl that have one."""
    return [line["train/loss"] for line in lines if "train/loss" in line][-WINDOW:]
