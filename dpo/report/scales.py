"""Ticks of axes, and numbers as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

STEPS = (1.0, 2.0, 5.0, 10.0)
"""The steps between ticks, times a power of ten."""


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, drawn from `start` to `stop` in the units of the drawing."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Returns the place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Returns round numbers from `low` to `high`, at most `most` of them: multiples of 1, 2 or 5 times a power of ten.

    ticks(0, 150) is [0, 50, 100, 150]; ticks(-0.3, 1.1) is [0, 0.5, 1].
    """
    step = tick_step(high - low, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_step(span: float, most: int) -> float:
    """Returns the least round step of which at most `most` ticks lie in a range of this length, wherever it begins."""
    least = span / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor for factor in STEPS if factor * power >= least * (1 - 1e-9)) * power


def widened(low: float, high: float, part: float = 0.04) -> tuple[float, float]:
    """Returns a range a little wider than from `low` to `high`, and of some width where both are equal."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = abs(low) / 2 or 0.5
        return low - half, high + half
    margin = part * (high - low)
    return low - margin, high + margin


def tick_labels(values: Sequence[float]) -> list[str]:
    """Returns the ticks as text, all with the same number of decimals; small and huge ones as 5e-7."""
    step = min((b - a for a, b in pairwise(values)), default=abs(values[0]) if values else 1.0)
    if step < 1e-3 or max(map(abs, values), default=0.0) >= 1e7:
        return [true_minus(scientific(value)) for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [true_minus(f"{value:z,.{decimals}f}") for value in values]


def scientific(value: float) -> str:
    """Returns 5e-7 for 0.0000005, 1.5e8 for 150,000,000, and 0 for 0."""
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if value else "0"


def true_minus(text: str) -> str:
    """Returns a number with a minus in place of a leading hyphen."""
    return f"−{text[1:]}" if text.startswith("-") else text


def shown(value: float | None) -> str:
    """Returns a number for people, in about three digits: 1,234,567, 12.3, 0.123, 5e-7; – where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0 or size >= 1000:
        return true_minus(f"{value:z,.0f}")
    if size < 1e-3:
        return true_minus(scientific(value))
    decimals = max(0, 2 - math.floor(math.log10(size)))
    return true_minus(f"{value:.{decimals}f}")


def shown_error(value: float) -> str:
    """Returns a standard error in one digit: 0.004, 2, 30, 5e-7."""
    if value <= 0:
        return "0"
    power = math.floor(math.log10(value))
    rounded = round(value, -power)
    return scientific(rounded) if power < -4 else f"{rounded:,.{max(0, -power)}f}"


def signed(value: float) -> str:
    """Returns a number with its sign, a true minus: +0.123, −0.123, 0."""
    text = shown(abs(value))
    return text if value == 0 else ("+" if value > 0 else "−") + text


def shown_count(value: float) -> str:
    """Returns a large count in about three digits: 12,345 as 12.3 k, 1,234,567 as 1.23 M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= unit:
            size = value / (1e3 if name == "k" else unit)
            return f"{size:.{max(0, 2 - math.floor(math.log10(size)))}f} {name}"
    return f"{value:,.0f}"


def shown_hours(hours: float) -> str:
    """Returns hours: 12.3 h, or minutes below one hour, or seconds below a minute."""
    if hours >= 1:
        return f"{shown(hours)} h"
    return f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"


def value_text(value: Any) -> str:
    """Returns a value of the config as text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else scientific(value)
    return str(value)
