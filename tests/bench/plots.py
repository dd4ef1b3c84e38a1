"""Figures of benchmarks, without a screen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Panel:
    """Lines over one axis: a value of each line for each x."""

    label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float]]


def draw(path: Path, panels: Sequence[Panel], label: str) -> None:
    """All panels on one page, three in a row, both axes logarithmic; `label` is that of the y axis.

    The first line of a panel is what was measured, as points; the others are what was expected.
    """
    num_rows = -(-len(panels) // 3)
    metric, grid = plt.subplots(num_rows, 3, figsize=(15, 4 * num_rows), squeeze=False, layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=False):
        for number, (name, values) in enumerate(panel.lines.items()):
            axes.plot(panel.x, values, "o" if number == 0 else "-", label=name)
        axes.set(xlabel=panel.label, ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(panel.x, [f"{value:,}" for value in panel.x], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    metric.savefig(path, dpi=110)
    plt.close(metric)


def draw_bars(path: Path, labels: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Panels one above the other; in each, a bar of every series (name -> a value for each label) at every label."""
    metric, grid = plt.subplots(len(panels), 1, figsize=(12, 4.5 * len(panels)), squeeze=False, layout="constrained")
    for axes, (title, series) in zip(grid.flat, panels.items(), strict=True):
        width = 0.8 / len(series)
        for number, (name, values) in enumerate(series.items()):
            bars = axes.bar([place + number * width for place in range(len(labels))], values, width, label=name)
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.set_xticks([place + 0.4 - width / 2 for place in range(len(labels))], labels, fontsize=8)
        axes.set_ylabel(title)
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
    metric.savefig(path, dpi=110)
    plt.close(metric)
