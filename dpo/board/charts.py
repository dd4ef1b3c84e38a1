"""The chart in TensorBoard of each metric of a run: its sub-run (which gives the color), group and tag.

TensorBoard groups charts by the first part of their tag, in alphabetical order. It draws one line per run in a chart,
and assigns colors to runs, not to tags. So the groups are numbered in the order in which a person reads them, and lines
that share a chart lie in different *sub-runs*, folders of RUN/tensorboard. Pure functions, without torch.
"""

from dataclasses import dataclass
from typing import NamedTuple

PREFERENCE, SIDES, OPTIMIZATION, SPEED = "1 preference", "2 chosen and rejected", "3 optimization", "4 speed"
REFERENCE, DISTRIBUTIONS, OTHER, TEXTS = "5 reference", "6 distributions", "7 other", "run"

ROOT = "."
"""The name of the sub-run in RUN/tensorboard itself."""

GROUPS = {
    "loss": PREFERENCE,
    "rewards/accuracies": PREFERENCE,
    "rewards/margins": PREFERENCE,
    "loss_sft": OPTIMIZATION,
    "grad_norm": OPTIMIZATION,
    "lr": OPTIMIZATION,
    "pairs_per_second": SPEED,
    "tokens_per_second": SPEED,
    "step_seconds": SPEED,
    "pairs": SPEED,
    "tokens": SPEED,
    "padding_fraction": SPEED,
    "peak_memory_bytes": SPEED,
    "mfu": SPEED,
}
"""The group of each metric but those of only chosen or rejected, by its name after train/ or eval/."""


class Place(NamedTuple):
    """The chart of a metric."""

    sub_run: str
    """Folder in RUN/tensorboard."""
    tag: str
    """`GROUP/chart`."""


def place(name: str) -> Place:
    """Returns the chart of the metric with this name in metrics.jsonl. Every name has one.

    | metric                                    | sub-run               | tag                                         |
    |-------------------------------------------|-----------------------|---------------------------------------------|
    | train/loss, eval/loss                     | train, eval           | 1 preference/loss                           |
    | train/rewards/margins, eval/...           | train, eval           | 1 preference/rewards/margins                |
    | train/rewards/chosen, train/rewards/rejected | train-chosen, train-rejected | 2 chosen and rejected/rewards     |
    | eval/logps/chosen, eval/logps/rejected    | eval-chosen, eval-rejected | 2 chosen and rejected/logps            |
    | train/grad_norm, train/lr                 | train                 | 3 optimization/grad_norm, .../lr            |
    | train/pairs_per_second                    | train                 | 4 speed/pairs_per_second                    |
    | reference/seconds                         | ROOT                  | 5 reference/seconds                         |
    | first_step/spread                         | ROOT                  | 5 reference/first_step/spread               |
    | train/new_metric                          | train                 | 7 other/new_metric                          |
    | a/name, name                              | ROOT                  | 7 other/a/name, 7 other/name                |
    """
    part, _, metric = name.partition("/")
    if part == "reference" and metric:
        return Place(ROOT, f"{REFERENCE}/{metric}")
    if part == "first_step" and metric:
        return Place(ROOT, f"{REFERENCE}/{name}")
    if part not in ("train", "eval") or not metric:
        return Place(ROOT, f"{OTHER}/{name}")
    chart, _, side = metric.rpartition("/")
    if chart and side in ("chosen", "rejected"):
        return Place(f"{part}-{side}", f"{SIDES}/{chart}")
    return Place(part, f"{GROUPS.get(metric, OTHER)}/{metric}")


def histogram_place(name: str) -> Place:
    """Returns the chart for the distribution of the values whose mean is the metric `name`.

    eval/rewards/margins -> 6 distributions/rewards/margins: histograms have their own group, because a tag cannot hold
    both scalars and histograms.
    """
    sub_run, tag = place(name)
    return Place(sub_run, f"{DISTRIBUTIONS}/{tag.partition('/')[2]}")


def text_place(name: str) -> Place:
    """Returns the place of a page of text. All are in one group: TensorBoard opens only the first groups of a tab."""
    return Place(ROOT, f"{TEXTS}/{name}")


@dataclass(frozen=True)
class Chart:
    """A chart of the Custom Scalars tab: the lines with this tag of all sub-runs."""

    title: str
    tag: str


LAYOUT = {
    "train against eval": (
        Chart("loss", f"{PREFERENCE}/loss"),
        Chart("accuracy: pairs whose winner is ahead", f"{PREFERENCE}/rewards/accuracies"),
        Chart("margin: reward of chosen minus rejected", f"{PREFERENCE}/rewards/margins"),
    ),
    "chosen against rejected": (
        Chart("rewards: beta (pi_logp - ref_logp); simpo, orpo: beta pi_logp / tokens", f"{SIDES}/rewards"),
        Chart("log-probabilities of a completion, nats", f"{SIDES}/logps"),
    ),
}
"""The Custom Scalars tab: title of a category -> its charts."""
