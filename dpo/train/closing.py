"""The terminal output at the end of a run: how its metrics changed, as numbers and as sparklines, and an answer."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from dpo.base.errors import RunError
from dpo.board.sink import Answer
from dpo.board.words import PAIR_METRICS
from dpo.command.exits import line_of
from dpo.config import LossConfig
from dpo.run.answers import read_answers
from dpo.run_folder.fallen import fallen_warning
from dpo.run_folder.files import FINAL, LAST_STEPS, NONFINITE, SKIPPED, read_metrics
from dpo.terminal.console import say, visible, warn
from dpo.train.setup import Run
from dpo.train.summary import COLUMNS, charts_command, table_lines

HARDLY_MOVED = 0.01
"""The change of the margin, in nats times beta, below which accuracies tell little."""
SHOWN = {"loss": "z.4f", "rewards/accuracies": "z.3f", "rewards/margins": "z.3f"}
"""Metric -> format, in which -0 is 0."""
BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE_COLUMNS = 60
"""The maximum number of characters of a sparkline."""
TEXT_COLUMNS = COLUMNS - len("reference  ")
"""The maximum number of characters of a prompt or an answer beside its name."""


def conclude(run: Run) -> None:
    """Shows, on rank 0, the end of the run: its steps, its model, how its metrics changed, a sampled answer; warns
    where winners have fallen far.
    """
    if not run.world.is_main:
        return
    last = max(run.start.step, run.inputs.last_step)
    what = "the adapters are" if run.inputs.model.adapters else "the model is"
    say(f"done: {last} steps, {what} in {run.dir / FINAL}")
    try:
        answers = read_answers(run.answers, last) if run.answers else []
        lines = read_metrics(run.dir)
    except (RunError, OSError) as failure:  # the model is there: a file that cannot be read does not fail the run
        warn(f"how the run went is not shown: {line_of(failure)}")
        return
    for line in end_lines(run.dir, lines, run.config.loss, answers):
        say(line)
    if fallen := fallen_warning(lines):
        warn(fallen)


def end_lines(
    run_dir: Path, lines: Sequence[Mapping[str, float]], loss: LossConfig, answers: Sequence[Answer] = ()
) -> list[str]:
    """Returns the table that is shown at the end: how the metrics in `lines` of metrics.jsonl changed, one answer, and
    the charts.

    For training, the first step is compared with the mean of the last LAST_STEPS, since a single step varies much.
    """
    steps = [line for line in lines if "train/loss" in line]
    skipped = sum(SKIPPED in line for line in lines)
    evaluations = [line for line in lines if "eval/loss" in line]
    latest = steps[-LAST_STEPS:]
    rows = []
    if len(steps) > 1:
        what = f"step 1 -> last {len(latest)}: "
        rows.append(("trained", what + _change(steps[0], latest, "train")))
    if len(evaluations) > 1:
        what = f"step {evaluations[0]['step']} -> step {evaluations[-1]['step']}: "
        rows.append(("held out", what + _change(evaluations[0], evaluations[-1:], "eval")))
    if len(evaluations) > 1 and _has_hardly_moved(evaluations[0], evaluations[-1], loss):
        advice = "try a larger optim.lr, more steps or a shorter warm-up"
        rows.append(("advice", f"the margin is about where it was: the model has hardly moved; {advice}"))
    if skipped:
        what = f"{skipped} step{'s' if skipped > 1 else ''} that were not finite; their pairs are in"
        rows.append(("skipped", f"{what} {run_dir / NONFINITE}"))
    rows += _sparkline_row("loss", steps, "train/loss") + _sparkline_row("margin", evaluations, "eval/rewards/margins")
    return table_lines([*rows, *_answer_rows(answers), ("charts", charts_command(run_dir))])


def _sparkline_row(name: str, lines: Sequence[Mapping[str, float]], key: str) -> list[tuple[str, str]]:
    """Returns a row with the sparkline of a metric and its first and last point; none where all are shown as one."""
    values = points([line[key] for line in lines if key in line])
    if len({f"{value:z.3f}" for value in values}) < 2:
        return []
    which = "held out, " if key.startswith("eval/") else ""
    return [(name, f"{sparkline(values)}  {which}{values[0]:z.3f} to {values[-1]:z.3f}")]


def points(values: Sequence[float]) -> list[float]:
    """Returns at most SPARKLINE_COLUMNS points: the values, or the means of successive values where there are more."""
    count = min(len(values), SPARKLINE_COLUMNS)
    bounds = [len(values) * i // count for i in range(count + 1)] if count else []
    return [statistics.fmean(values[begin:end]) for begin, end in pairwise(bounds)]


def sparkline(values: Sequence[float]) -> str:
    """Returns a character per value, from the lowest block at the minimum to the highest at the maximum."""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def _answer_rows(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """Returns rows with the end of a prompt, and the beginnings of the answers of reference and policy: of the first
    prompt that they answer differently.
    """
    for answer in [answer for answer in answers if answer.policy != answer.reference] or answers[:1]:
        prompt = _one_line(answer.prompt)
        shown = prompt if len(prompt) <= TEXT_COLUMNS else f"…{prompt[1 - TEXT_COLUMNS :]}"
        return [("prompt", shown), ("reference", _beginning(answer.reference)), ("policy", _beginning(answer.policy))]
    return []


def _beginning(text: str) -> str:
    line = _one_line(text) or "(an empty answer)"
    return line if len(line) <= TEXT_COLUMNS else f"{line[: TEXT_COLUMNS - 1]}…"


def _one_line(text: str) -> str:
    """Returns a text as one line in which every character is harmless and visible."""
    return visible(text.strip()).replace("\n", "")


def _change(first: Mapping[str, float], latest: Sequence[Mapping[str, float]], group: str) -> str:
    """Returns loss, accuracy and margin of the first line -> their means over the latest lines."""
    changes = [
        f"{PAIR_METRICS[name].short} {first[key]:{form}} -> {_mean(latest, key):{form}}"
        for name, key, form in ((name, f"{group}/{name}", form) for name, form in SHOWN.items())
        if key in first and any(key in line for line in latest)
    ]
    return "  ".join(changes)


def _mean(lines: Sequence[Mapping[str, float]], key: str) -> float:
    """Returns the mean of a metric over the lines that have it; one that was not finite is left out."""
    return statistics.fmean(line[key] for line in lines if key in line)


def _has_hardly_moved(first: Mapping[str, float], last: Mapping[str, float], loss: LossConfig) -> bool:
    """Returns whether two evaluations have about the same margin. That of a loss without a reference does not tell."""
    margins = [line["eval/rewards/margins"] for line in (first, last) if "eval/rewards/margins" in line]
    return loss.facts.rewards == "implicit" and len(margins) == 2 and abs(margins[1] - margins[0]) < HARDLY_MOVED
