"""Several runs side by side: the config keys that differ, curves by run, heat maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.report.drawing import DASHES, Chart, Series, line_chart
from dpo.report.metrics import cost, curve, last_split, latest, smooth
from dpo.report.numbers import nats_per_token
from dpo.report.record import Record
from dpo.report.scales import shown, shown_hours, signed, value_text
from dpo.report.story import FALLEN

COLORS = 10
"""Colors of runs in the style sheet, --run0 to --run9; further runs have dashed lines."""
NEUTRAL = ("train.run_dir", "train.log_every", "train.eval_every", "train.profile_steps", "reference.cache_dir")
NEUTRAL_SECTIONS = ("checkpoint", "parallel", "eval")
"""Keys and sections that do not change what is learnt; a sweep is not over them."""
HEAT_MAPS = {"eval/rewards/accuracies": "held-out accuracy", "eval/rewards/margins": "held-out margin"}
"""The metrics of the heat maps unless another is asked for."""
LOWER_IS_BETTER = ("loss", "loss_sft")
CURVES = {
    "eval/loss": "Held-out loss",
    "eval/rewards/accuracies": "Held-out accuracy",
    "eval/rewards/margins": "Held-out margin",
    "eval/rewards/chosen": "Held-out reward of chosen",
    "eval/rewards/rejected": "Held-out reward of rejected",
    "train/loss": "Training loss, running mean",
    "train/rewards/margins": "Training margin, running mean",
    "train/grad_norm": "Gradient norm, running mean",
}
"""The charts with a line per run: metric -> heading."""


@dataclass(frozen=True)
class RunRow:
    """A run in the table of all runs."""

    name: str
    hue: str
    dash: int
    values: tuple[str, ...]
    """Of the keys that differ."""
    cells: tuple[str, ...]
    """Under HEADINGS."""
    has_fallen: bool
    """Winners are below FALLEN nats per token."""
    state: str


HEADINGS = ("loss", "accuracy", "margin", "winner up", "loser down", "winner, nats/token", "hours")


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map."""

    value: float | None
    """The mean over the runs of the cell; None where none has the metric."""
    runs: int
    share: float
    """The part of full color, 0 for the worst cell to 1 for the best."""
    is_best: bool


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


def names_of(records: Sequence[Record]) -> list[str]:
    """Returns the shortest ends of the runs' paths that are all different."""
    parts = [record.folder.resolve().parts for record in records]
    for depth in range(1, max(map(len, parts), default=1)):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(Path(*path)) for path in parts]


def differing(records: Sequence[Record]) -> list[str]:
    """Returns the config keys whose values differ between runs and that change what is learnt."""
    keys = dict.fromkeys(key for record in records for key in record.config)
    return [
        key
        for key in keys
        if key not in NEUTRAL
        and key.partition(".")[0] not in NEUTRAL_SECTIONS
        and len({repr(record.config.get(key)) for record in records}) > 1
    ]


def look_of(number: int) -> tuple[str, int]:
    """Returns the hue and the dash of the run with this number."""
    return f"run{number % COLORS}", number // COLORS % len(DASHES)


# --- the table and the curves -----------------------------------------------------------------------------------------


def run_rows(records: Sequence[Record], keys: Sequence[str]) -> list[RunRow]:
    """Returns a row per run."""
    return [
        _run_row(record, name, number, keys)
        for number, (record, name) in enumerate(zip(records, names_of(records), strict=True))
    ]


def _run_row(record: Record, name: str, number: int, keys: Sequence[str]) -> RunRow:
    group = "eval" if record.evals else "train"
    metrics = [latest(record, f"{group}/{metric}") for metric in ("loss", "rewards/accuracies", "rewards/margins")]
    split, pairs = last_split(record), record.pairs[max(record.pairs)] if record.pairs else {}
    per_token = nats_per_token(pairs, "chosen")
    moves = (split.winner, -split.loser) if split else (None, None)
    texts = ["–" if value is None else signed(value) for value in (*moves, per_token)]
    of = f" of {record.last_step:,}" if record.last_step else ""
    return RunRow(
        name,
        *look_of(number),
        values=tuple(value_text(record.config.get(key)) for key in keys),
        cells=(*map(shown, metrics), *texts, shown_hours(cost(record).hours)),
        has_fallen=per_token is not None and per_token < FALLEN,
        state=f"{record.step:,}{of}" + ("" if record.is_done else ", not finished"),
    )


def run_curves(records: Sequence[Record]) -> list[Chart]:
    """Returns the charts of CURVES with a line per run that has the metric."""
    charts, names = [], names_of(records)
    for metric, title in CURVES.items():
        is_eval = metric.startswith("eval/")
        series = []
        for number, record in enumerate(records):
            points = curve(record.evals if is_eval else record.train, metric)
            hue, dash = look_of(number)
            series.append(
                Series(names[number], hue, points if is_eval else smooth(points), has_dots=is_eval, dash=dash)
            )
        if any(line.points for line in series):
            charts.append(line_chart(title, metric, series))
    return charts


# --- heat maps --------------------------------------------------------------------------------------------------------


def heat_maps(records: Sequence[Record], keys: Sequence[str], metric: str | None = None) -> list[HeatMap]:
    """Returns the heat maps of a sweep over one or two keys; none for other sets of runs.

    Args:
        records: the runs.
        keys: the config keys that differ.
        metric: the name of a metric in metrics.jsonl; None: those of HEAT_MAPS.
    """
    if len(keys) not in (1, 2):
        return []
    titles = HEAT_MAPS if metric is None else {metric: metric}
    maps = [heat_map(records, keys, name, title) for name, title in titles.items()]
    return [found for found in maps if any(cell.value is not None for row in found.cells for cell in row)]


def heat_map(records: Sequence[Record], keys: Sequence[str], metric: str, title: str) -> HeatMap:
    """Returns the heat map of a metric by one key (a single row) or two (the first down, the second across)."""
    down, across = (keys[0], keys[1]) if len(keys) == 2 else ("", keys[0])
    rows = _values(records, down) if down else [None]
    columns = _values(records, across)
    table: dict[tuple[int, int], list[float]] = {}
    for record in records:
        value = latest(record, metric)
        row = _index(rows, record.config.get(down)) if down else 0
        if value is not None:
            table.setdefault((row, _index(columns, record.config.get(across))), []).append(value)
    means = {place: sum(values) / len(values) for place, values in table.items()}
    cells = _cells(means, {place: len(values) for place, values in table.items()}, (len(rows), len(columns)), metric)
    row_texts = tuple(map(value_text, rows)) if down else ("",)
    return HeatMap(title, down, across, row_texts, tuple(map(value_text, columns)), cells)


def _cells(
    means: dict[tuple[int, int], float], counts: dict[tuple[int, int], int], shape: tuple[int, int], metric: str
) -> tuple[tuple[Cell, ...], ...]:
    low, high = (min(means.values()), max(means.values())) if means else (0.0, 0.0)
    is_lower_better = metric.rpartition("/")[2] in LOWER_IS_BETTER

    def cell(row: int, column: int) -> Cell:
        value = means.get((row, column))
        if value is None:
            return Cell(None, 0, 0.0, False)
        share = (value - low) / (high - low) if high > low else 0.5
        share = 1 - share if is_lower_better else share
        return Cell(value, counts[row, column], share, share == 1)

    return tuple(tuple(cell(row, column) for column in range(shape[1])) for row in range(shape[0]))


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
