"""Numbers of metrics.jsonl: curves, the split of the margin, hours. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo.report.record import Line, Record
from dpo.run_folder.files import LAST_STEPS

Point = tuple[float, float]
"""(step, value)."""
MOST_POINTS = 400
"""Points of a curve: a longer run is shown by means of successive steps."""
ACCURACIES, MARGINS = "rewards/accuracies", "rewards/margins"
NO_PREFERENCE = 1e-6
"""The mean margin below which policy and reference are the same but for rounding. Ties count as wrong there, so that
accuracies tell nothing, and are not shown."""
MEAN_OVER = 25
"""A bold curve of training is a mean over 1/25 of the steps."""


@dataclass(frozen=True)
class Split:
    """The change of both rewards, whose difference is the change of the margin."""

    step: int
    winner: float
    """The change of the winners' mean reward."""
    loser: float
    """The change of the losers' mean reward."""

    @property
    def margin(self) -> float:
        """Returns the change of the margin: what winners went up plus what losers went down."""
        return self.winner - self.loser


@dataclass(frozen=True)
class Cost:
    """The time of the steps and of the reference pass; evaluations, checkpoints and starts are not in it."""

    hours: float
    least_device_hours: float
    most_device_hours: float
    """Both are the same unless starts had different numbers of ranks: which step ran on how many is not recorded."""
    devices: str
    """`8 × NVIDIA H100`, of the last start; empty where it is not known."""
    has_gpus: bool


# --- curves -----------------------------------------------------------------------------------------------------------


def lines_with(lines: Sequence[Line], name: str) -> list[Line]:
    """Returns the lines that have a metric which tells something: see NO_PREFERENCE."""
    margins = name.replace(ACCURACIES, MARGINS)
    is_told = not name.endswith(ACCURACIES)
    return [line for line in lines if name in line and (is_told or abs(line.get(margins, 1.0)) > NO_PREFERENCE)]


def curve(lines: Sequence[Line], name: str) -> list[Point]:
    """Returns the metric of each line that has it, in at most MOST_POINTS points: means of successive lines."""
    found = [(float(line["step"]), line[name]) for line in lines_with(lines, name)]
    if len(found) <= MOST_POINTS:
        return found
    parts = np.array_split(np.array(found), MOST_POINTS)
    return [(float(step), float(value)) for step, value in (part.mean(0) for part in parts)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Returns the running mean of a curve, each over the points at most 1/50 of all before and after it."""
    half = len(points) // MEAN_OVER // 2
    if half == 0:
        return list(points)
    sums = np.concatenate([[0.0], np.cumsum([value for _, value in points])])
    at = np.arange(len(points))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(points))
    means = (sums[last] - sums[first]) / (last - first)
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def latest(record: Record, name: str) -> float | None:
    """Returns the newest value of a metric of evaluations, or the mean of the last LAST_STEPS steps of one of training;
    None where there is none.
    """
    lines, last = (record.evals, 1) if name.startswith("eval/") else (record.train, LAST_STEPS)
    values = [line[name] for line in lines_with(lines, name)[-last:]]
    return sum(values) / len(values) if values else None


# --- the split of the margin ------------------------------------------------------------------------------------------


def splits(record: Record) -> list[Split]:
    """Returns the change of both rewards at each evaluation, or at each training step where there is no evaluation.

    Changes are counted from the first line; where the policy started from its reference and was not evaluated before
    the first step, from the rewards of 0 there.
    """
    group, lines = ("eval", record.evals) if record.evals else ("train", record.train)
    names = [f"{group}/rewards/{side}" for side in ("chosen", "rejected")]
    found = [
        (int(line["step"]), line[names[0]], line[names[1]]) for line in lines if all(name in line for name in names)
    ]
    if not found:
        return []
    step, *first = found[0]
    winner, loser = (0.0, 0.0) if step > 0 and record.begins_at_reference else first
    return [Split(step, chosen - winner, rejected - loser) for step, chosen, rejected in found]


def last_split(record: Record, every: Sequence[Split]) -> Split | None:
    """Returns the split at the last evaluation, or without evaluations the mean of the last LAST_STEPS steps.

    Args:
        record: the run.
        every: its splits, as `splits` returns them.
    """
    if not every:
        return None
    last = every[-1:] if record.evals else every[-LAST_STEPS:]
    winner, loser = (sum(getattr(split, name) for split in last) / len(last) for name in ("winner", "loser"))
    return Split(last[-1].step, winner, loser)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(record: Record) -> Cost:
    """Returns the hours of a run, from the seconds of its steps and of its reference passes, and of its devices."""
    seconds = sum(line.get("train/step_seconds", 0.0) + line.get("reference/seconds", 0.0) for line in record.lines)
    ranks = [start["ranks"] for start in record.starts if isinstance(start.get("ranks"), int)] or [1]
    devices = _devices(record.starts[-1] if record.starts else {})
    names = " and ".join(f"{count} × {name}" for name, count in devices.items())
    hours = seconds / 3600
    return Cost(hours, hours * min(ranks), hours * max(ranks), names, bool(devices) and set(devices) != {"cpu"})


def _devices(start: Mapping[str, Any]) -> Mapping[str, Any]:
    layout = start.get("layout")
    devices = layout.get("devices") if isinstance(layout, dict) else None
    return devices if isinstance(devices, dict) else {}


def total_tokens(record: Record) -> float:
    """Returns the prompt and completion tokens that were trained on, a shared prompt counted once per step."""
    return sum(line.get("train/tokens", 0.0) for line in record.train)
