"""A sweep as heat maps: a metric by one or two config keys, each cell the mean over its seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo.board.words import PAIR_METRICS, words_of
from dpo.config.effects import SEED
from dpo.report.metrics import latest, lines_with
from dpo.report.record import Record
from dpo.report.scales import value_text

METRICS = ("rewards/accuracies", "rewards/margins")
"""The metrics of evaluations that have a heat map unless another is asked for."""

Place = tuple[int, int]
"""The row and column of a cell."""


@dataclass(frozen=True)
class Value:
    """The newest value of a metric of a run."""

    value: float
    step: int
    is_done: bool
    """All steps of the run are done."""


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map."""

    value: float | None = None
    """The mean over the runs of the cell; None where none has the metric."""
    error: float | None = None
    """The standard error of the mean; None of a single run."""
    runs: int = 0
    step: int | None = None
    """The least step of its runs where not all of them are done; None where all are."""
    share: float | None = None
    """The part of full color, 0 for the worst cell to 1 for the best; None: the cell is not compared."""
    is_best: bool = False

    @property
    def notes(self) -> list[str]:
        """Returns the number of runs where there are several, and the step where they are not done."""
        count = [f"{self.runs} runs"] if self.runs > 1 else []
        return count if self.step is None else [*count, f"unfinished: step {self.step:,}"]


@dataclass(frozen=True)
class HeatMap:
    """A metric by one or two config keys."""

    title: str
    row_key: str
    """Empty with one key."""
    column_key: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]


def heat_maps(records: Sequence[Record], keys: Sequence[str], metric: str | None = None) -> list[HeatMap]:
    """Returns the heat maps of a sweep over one or two keys; none for other sets of runs.

    Args:
        records: the runs.
        keys: the config keys that differ. The seed is an axis only where it is the only key.
        metric: the name of a metric in metrics.jsonl; None: those of METRICS.
    """
    axes = [key for key in keys if key != SEED] or list(keys)
    if len(axes) not in (1, 2):
        return []
    held_out = {f"eval/{name}": f"held-out {PAIR_METRICS[name].long}" for name in METRICS}
    titles = held_out if metric is None else {metric: metric}
    maps = [heat_map(records, axes, name, title) for name, title in titles.items()]
    return [found for found in maps if any(cell.value is not None for row in found.cells for cell in row)]


def heat_map(records: Sequence[Record], axes: Sequence[str], metric: str, title: str) -> HeatMap:
    """Returns the heat map of a metric by one key (a single row) or two (the first down, the second across)."""
    down, across = (axes[0], axes[1]) if len(axes) == 2 else ("", axes[0])
    rows = _values(records, down) if down else [None]
    columns = _values(records, across)
    table: dict[Place, list[Value]] = {}
    for record in records:
        found = value_of(record, metric)
        row = _index(rows, record.config.get(down)) if down else 0
        if found is not None:
            table.setdefault((row, _index(columns, record.config.get(across))), []).append(found)
    cells = colored({place: cell_of(values) for place, values in table.items()}, metric)
    grid = tuple(tuple(cells.get((row, column), Cell()) for column in range(len(columns))) for row in range(len(rows)))
    row_texts = tuple(map(value_text, rows)) if down else ("",)
    return HeatMap(title, down, across, row_texts, tuple(map(value_text, columns)), grid)


def value_of(record: Record, metric: str) -> Value | None:
    """Returns the newest value of a metric, as `latest`, with its step."""
    value = latest(record, metric)
    if value is None:
        return None
    step = int(lines_with(record.evals if metric.startswith("eval/") else record.train, metric)[-1]["step"])
    return Value(value, step, record.is_done or step == record.last_step)


def cell_of(values: Sequence[Value]) -> Cell:
    """Returns the cell of one run or several, without its color."""
    numbers = [found.value for found in values]
    count = len(numbers)
    error = statistics.stdev(numbers) / math.sqrt(count) if count > 1 else None
    step = None if all(found.is_done for found in values) else min(found.step for found in values)
    return Cell(statistics.fmean(numbers), error, count, step)


def colored(cells: Mapping[Place, Cell], metric: str) -> dict[Place, Cell]:
    """Returns the cells with their colors. Cells whose runs are all done are compared; where there is none, the cells
    of the greatest step.
    """
    steps = {cell.step for cell in cells.values()}
    compared_step = None if None in steps else max((step for step in steps if step is not None), default=None)
    words = words_of(metric)
    sign = -1 if words is not None and words.lower_is_better else 1
    scores = {place: sign * (cell.value or 0.0) for place, cell in cells.items() if cell.step == compared_step}
    return {place: _colored(cell, scores.get(place), list(scores.values())) for place, cell in cells.items()}


def _colored(cell: Cell, score: float | None, scores: Sequence[float]) -> Cell:
    """Returns a cell with its color among the scores that are compared; None: it is not compared."""
    if score is None:
        return cell
    low, high = min(scores), max(scores)
    share = (score - low) / (high - low) if high > low else 0.5
    return Cell(cell.value, cell.error, cell.runs, cell.step, share, is_best=share == 1)


def _values(records: Sequence[Record], key: str) -> list[Any]:
    """Returns the different values of a key: numbers rising, other values in the order of the runs."""
    found: list[Any] = []
    for record in records:
        if not any(repr(value) == repr(record.config.get(key)) for value in found):
            found.append(record.config.get(key))
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in found)
    return sorted(found) if is_number else found


def _index(values: Sequence[Any], value: Any) -> int:
    return next(i for i, known in enumerate(values) if repr(known) == repr(value))
