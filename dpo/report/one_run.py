"""The numbers and charts of the page of one run. Each part is empty where the run has nothing for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpo.board.words import PAIR_METRICS
from dpo.report.drawing import Chart, Series, diagonal_chart, histogram_chart, line_chart, scatter_chart
from dpo.report.metrics import Cost, curve, last_split, latest, smooth, splits, total_tokens
from dpo.report.numbers import (
    calibration,
    correlation,
    grouped,
    histogram,
    margins_of,
    shared_edges,
    thinned,
)
from dpo.report.record import Pairs, Record
from dpo.report.scales import shown, shown_count, shown_hours
from dpo.report.story import (
    calibration_sentences,
    length_sentence,
    split_sentences,
    token_sentence,
    where_from,
)
from dpo.run_folder.fallen import fallen_warning

MOST_DOTS = 3000
"""Points of the scatter."""
UNITS = {"implicit": "reward, nats × beta", "per_token": "reward, nats per token × beta"}


@dataclass(frozen=True)
class Curves:
    """A chart of metrics of training and evaluation."""

    title: str
    y_label: str
    metrics: Mapping[str, str]
    """Name of a metric without train/ or eval/ -> its hue; "": one hue for training, another for evaluation."""
    is_exact: bool = False
    """The metric does not vary by chance: no running mean."""


CURVES = (
    Curves("Loss", "nats per pair", {"loss": ""}),
    Curves("Accuracy", "share of pairs whose winner is ahead", {"rewards/accuracies": ""}),
    Curves("Margin: reward of chosen minus rejected", "reward", {"rewards/margins": ""}),
    Curves("Rewards, thin: training", "reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Curves("Log-probability, thin: training", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    Curves(
        "Log pi − log ref per token, thin: training",
        "nats per token",
        {"logratios_per_token/chosen": "chosen", "logratios_per_token/rejected": "rejected"},
    ),
    Curves("Gradient norm, before clipping", "L2 norm", {"grad_norm": ""}),
    Curves("Learning rate", "rate", {"lr": ""}, is_exact=True),
    Curves("Speed", "tokens per second", {"tokens_per_second": ""}),
)


def key_numbers(record: Record, spent: Cost) -> list[tuple[str, str]]:
    """Returns (number, meaning) of the numbers at the top of the page.

    Args:
        record: the run.
        spent: its hours and devices.
    """
    of = f" of {record.last_step:,}" if record.last_step else ""
    numbers = [(f"{record.step:,}{of}", "steps: done" if record.is_done else "steps: not finished")]
    group, where = ("eval", "held-out") if record.evals else ("train", "training")
    for name in ("rewards/accuracies", "rewards/margins", "loss"):
        if (value := latest(record, f"{group}/{name}")) is not None:
            numbers.append((shown(value), f"{where} {PAIR_METRICS[name].long}"))
    if record.evals and "eval/pairs" in record.evals[-1]:
        numbers.append((f"{record.evals[-1]['eval/pairs']:,.0f}", "held-out pairs"))
    return numbers + (_cost_numbers(record, spent) if spent.hours else [])


def _cost_numbers(record: Record, spent: Cost) -> list[tuple[str, str]]:
    least, most = shown(spent.least_device_hours), shown(spent.most_device_hours)
    where = f" on {spent.devices}" if spent.devices else ""
    return [
        (shown_hours(spent.hours), f"steps and reference pass{where}"),
        (
            least if least == most else f"{least} to {most}",
            f"{'GPU-hours' if spent.has_gpus else 'rank-hours'} of steps and reference pass",
        ),
        (shown_count(total_tokens(record)), "tokens trained on"),
    ]


# --- curves -----------------------------------------------------------------------------------------------------------


def curve_charts(record: Record) -> list[Chart]:
    """Returns the charts of CURVES for which the run has a metric."""
    charts = []
    for curves in CURVES:
        series = [line for name in curves.metrics for line in _series(record, name, curves)]
        if any(line.points for line in series):
            charts.append(line_chart(curves.title, curves.y_label, series))
    return charts


def _series(record: Record, name: str, curves: Curves) -> list[Series]:
    """Returns the lines of a metric: single steps thin and their running mean bold, and evaluations with dots."""
    hue = curves.metrics[name]
    side = f" {name.rpartition('/')[2]}" if hue else ""
    steps, evaluations = curve(record.train, f"train/{name}"), curve(record.evals, f"eval/{name}")
    if hue and evaluations:  # two sides and two groups: training stays in the background
        return [
            Series("", hue, smooth(steps), is_bold=False),
            Series(f"held-out{side}", hue, evaluations, has_dots=True),
        ]
    mean = steps if curves.is_exact else smooth(steps)
    is_smoothed = mean != steps
    train = Series(f"training{side}{', running mean' if is_smoothed else ''}", hue or "prompt", mean)
    return [
        *([Series("", hue or "prompt", steps, is_bold=False)] if is_smoothed else []),
        train,
        Series(f"held-out{side}", hue or "special", evaluations, has_dots=True),
    ]


# --- why both rewards fall --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Why:
    """The split of the margin, and what it says."""

    chart: Chart
    sentences: tuple[str, ...]
    warning: str | None


def why(record: Record) -> Why | None:
    """Returns the split of the margin into winner up and loser down; None where the run has no rewards."""
    every = splits(record)
    last = last_split(record, every)
    if last is None:
        return None
    columns = {
        name: [(float(split.step), getattr(split, name)) for split in every] for name in ("winner", "loser", "margin")
    }
    has_dots = bool(record.evals)
    lines = (
        Series("margin: their sum", "ink", _fewer(columns["margin"]), has_dots=has_dots),
        Series("winner up", "chosen", _fewer(columns["winner"]), has_dots=has_dots),
        Series("loser down", "rejected", _fewer([(x, -y) for x, y in columns["loser"]]), has_dots=has_dots),
    )
    sentences = filter(None, [*split_sentences(last, record), token_sentence(record), where_from(record)])
    chart = line_chart("What the margin is made of", _unit(record), lines)
    return Why(chart, tuple(sentences), fallen_warning(record.lines))


def _fewer(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [points[i] for i in thinned(len(points), 400)]


def _unit(record: Record) -> str:
    return UNITS.get(str(record.facts.rewards), "reward") if record.facts else "reward"


def _last_pairs(record: Record) -> Pairs:
    """Returns the values of single pairs at the last evaluation; empty where there are none."""
    return record.pairs[max(record.pairs)] if record.pairs else {}


# --- single pairs -----------------------------------------------------------------------------------------------------


def reward_charts(record: Record) -> list[Chart]:
    """Returns the overlaid histograms of both rewards, at the last and at the first evaluation, on one axis."""
    sides = ("chosen", "rejected")
    found = {step: pairs for step, pairs in record.pairs.items() if margins_of(pairs) is not None}
    if not found:
        return []
    edges = shared_edges([pairs[f"rewards_{side}"] for pairs in found.values() for side in sides])
    charts = []
    for step in sorted(found, reverse=True):
        bars = [(side, histogram(found[step][f"rewards_{side}"], edges)) for side in sides]
        beyond = sum(bar.beyond for _, bar in bars)
        title = f"Rewards after step {step:,}{f', {beyond:,} values beyond' if beyond else ''}"
        charts.append(histogram_chart(title, _unit(record), bars, max(int(bar.counts.max()) for _, bar in bars) or 1))
    return charts


def length_chart(record: Record) -> tuple[Chart, str] | None:
    """Returns margin against difference in length at the last evaluation, and what their correlation says."""
    pairs = _last_pairs(record)
    margins = margins_of(pairs)
    if margins is None:
        return None
    longer = pairs["tokens_chosen"].astype(np.float64) - pairs["tokens_rejected"]
    shown_pairs = thinned(len(longer), MOST_DOTS)
    means = [(group.x, group.y) for group in grouped(longer, margins, longer)]
    line = Series("mean of a tenth of the pairs", "ink", means, has_dots=True)
    of = (
        f"{len(shown_pairs):,} of {len(longer):,} pairs" if len(shown_pairs) < len(longer) else f"{len(longer):,} pairs"
    )
    points = list(zip(longer[shown_pairs].tolist(), margins[shown_pairs].tolist(), strict=True))
    labels = ("tokens of chosen − tokens of rejected", f"margin ({_unit(record)})")
    chart = scatter_chart(f"Margin against difference in length, {of}", labels, points, line)
    return chart, length_sentence(correlation(longer, margins))


def calibration_chart(record: Record) -> tuple[Chart, list[str]] | None:
    """Returns observed against predicted preferences at the last evaluation; None where `predicts_preferences` is False
    or all pairs are ties.
    """
    margins = margins_of(_last_pairs(record))
    if margins is None or not margins.any() or not predicts_preferences(record):
        return None
    found = calibration(margins)
    points = [(group.x, group.y, error) for group, error in zip(found.groups, found.errors, strict=True)]
    labels = ("predicted: sigmoid(|margin|)", "observed: winner ahead")
    return diagonal_chart("Calibration", labels, points), calibration_sentences(found)


def predicts_preferences(record: Record) -> bool:
    """Returns whether sigmoid(margin) is the probability that the loss fits to the labels: the loss is that of Bradley
    and Terry, and no key moves its optimum.
    """
    config, facts = record.config, record.facts
    sources = config.get("data.train") or []
    has_offsets = any("margin" in (source.get("columns") or {}) for source in sources if isinstance(source, dict))
    moved = config.get("loss.label_smoothing") or config.get("loss.length_normalized") or has_offsets
    return facts is not None and facts.is_bradley_terry and not moved
