"""TensorBoard's tags of a run's metrics, histograms and texts, and its page of charts. Pure functions, without torch.

All events of a run lie in one folder, so that it is one run of TensorBoard: one color in all charts, one box to tick,
one row in the HParams tab. The tag of a metric is its name in metrics.jsonl. TensorBoard groups charts by the first
part of their tag, in alphabetical order, and opens the first two groups: `eval` and `train`.
"""

from dataclasses import dataclass

ONCE = ("reference", "first_step")
"""First parts of the names of metrics that a run has once, before its first step. They have no chart, which would be a
single point in a group before `train`; the text `summary` shows them."""

VALUES = "values"
"""The group of histograms, which TensorBoard shows after all others."""

TEXTS = "run"
"""The group of texts; all are in one, since TensorBoard opens only the first groups of a tab."""


def has_chart(name: str) -> bool:
    """Returns whether the metric with this name in metrics.jsonl has a chart."""
    return name.partition("/")[0] not in ONCE


def histogram_tag(name: str) -> str:
    """Returns the tag of the histogram of the values whose mean is the metric `name`: a tag cannot hold both."""
    return f"{VALUES}/{name}"


def text_tag(name: str) -> str:
    """Returns the tag of a page of text."""
    return f"{TEXTS}/{name}"


@dataclass(frozen=True)
class Chart:
    """A chart of the Custom Scalars tab, with at most three tags: TensorBoard tells the tags of a run apart by symbol
    alone, since color stands for the run.
    """

    title: str
    tags: tuple[str, ...]


def both(name: str) -> tuple[str, ...]:
    """Returns the tags of a metric over the evaluation pairs and over the pairs of each step."""
    return f"eval/{name}", f"train/{name}"


def sides(name: str) -> tuple[str, ...]:
    """Returns the tags of a metric of the evaluation pairs' completions, chosen and rejected."""
    return f"eval/{name}/chosen", f"eval/{name}/rejected"


LAYOUT = {
    "eval and train (the default smoothing of 0.6 lags behind: with few evaluations set it to 0)": (
        Chart("loss", both("loss")),
        Chart("accuracy: pairs whose winner is ahead", both("rewards/accuracies")),
        Chart("margin: reward of chosen minus rejected", both("rewards/margins")),
    ),
    "eval: chosen and rejected (smoothing lags behind here too)": (
        Chart("rewards: beta (pi_logp - ref_logp); simpo, orpo: beta pi_logp / tokens", sides("rewards")),
        Chart("log-probabilities of a completion, nats", sides("logps")),
    ),
}
"""The Custom Scalars tab: title of a category -> its charts."""
