"""The terminal output at the end of a run: how its metrics changed, and whether the model has moved at all."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo.base.console import say
from dpo.config import LossConfig
from dpo.run.files import FINAL, LAST_STEPS, read_metrics
from dpo.run.setup import Run
from dpo.run.summary import table_lines

HARDLY_MOVED = 0.01
"""The margin, in nats times beta, below which accuracies tell little."""


def conclude(run: Run) -> None:
    """Shows, on rank 0, the end of the run: its steps, its model, how its metrics changed."""
    if not run.world.is_main:
        return
    say(f"done: {max(run.start.step, run.inputs.last_step)} steps, the model is in {run.dir / FINAL}")
    for line in end_lines(run.dir, read_metrics(run.dir), run.config.loss):
        say(line)


def end_lines(run_dir: Path, lines: Sequence[Mapping[str, float]], loss: LossConfig) -> list[str]:
    """Returns the table that is shown at the end: how the metrics in `lines` of metrics.jsonl changed, and the charts.

    For training, the first step is compared with the mean of the last LAST_STEPS, since a single step varies much.
    """
    steps = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    latest = steps[-LAST_STEPS:]
    rows = []
    if len(steps) > 1:
        what = f"step 1 -> mean of the last {len(latest)}: "
        rows.append(("trained", what + _change(steps[0], latest, "train")))
    if len(evaluations) > 1:
        what = f"step {evaluations[0]['step']} -> step {evaluations[-1]['step']}: "
        rows.append(("held out", what + _change(evaluations[0], evaluations[-1:], "eval")))
    if len(evaluations) > 1 and _has_hardly_moved(evaluations[-1], loss):
        advice = "try a larger optim.lr, more steps or a shorter warm-up"
        rows.append(("margin", f"the margin is about 0: the model has hardly moved; {advice}"))
    return table_lines([*rows, ("charts", f"tensorboard --logdir {run_dir}")])


def _change(first: Mapping[str, float], latest: Sequence[Mapping[str, float]], group: str) -> str:
    """Returns loss, accuracy and margin of the first line -> their means over the latest lines."""
    names = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    keys = {f"{group}/{name}": shown for name, shown in names.items() if f"{group}/{name}" in first}
    changes = [
        f"{shown} {first[key]:z.4f} -> {statistics.fmean(line[key] for line in latest):z.4f}"
        for key, shown in keys.items()
    ]
    return "  ".join(changes)


def _has_hardly_moved(evaluation: Mapping[str, float], loss: LossConfig) -> bool:
    """Returns whether the margin of an evaluation is about 0, as before training. Rewards without a reference do not
    tell.
    """
    margin = evaluation.get("eval/rewards/margins")
    return loss.facts.rewards == "implicit" and margin is not None and abs(margin) < HARDLY_MOVED
