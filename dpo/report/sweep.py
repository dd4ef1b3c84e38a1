"""Several runs side by side: the config keys that differ, a table and curves by run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.config.effects import NEUTRAL
from dpo.report.drawing import DASHES, Chart, Series, line_chart
from dpo.report.metrics import cost, curve, last_split, latest, smooth, splits
from dpo.report.record import Record
from dpo.report.scales import shown, shown_hours, signed, value_text
from dpo.run_folder.fallen import FALLEN, nats_per_token

COLORS = 10
"""Colors of runs in the style sheet, --run0 to --run9; further runs have dashed lines."""
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


HEADINGS = ("loss", "accuracy", "margin", "winner up", "loser down", "winner, nats/token", "time of steps")


def names_of(records: Sequence[Record]) -> list[str]:
    """Returns the shortest ends of the runs' paths that are all different."""
    parts = [record.folder.resolve().parts for record in records]
    for depth in range(1, max(map(len, parts), default=1)):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(Path(*path)) for path in parts]


def differing(records: Sequence[Record]) -> list[str]:
    """Returns the config keys whose values differ between runs, without those that do not change the result."""
    keys = dict.fromkeys(key for record in records for key in record.config)
    return [key for key in keys if key not in NEUTRAL and len({repr(record.config.get(key)) for record in records}) > 1]


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
    split, per_token = last_split(record, splits(record)), nats_per_token(record.lines)
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
