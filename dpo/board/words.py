"""Words for the metrics that training and evaluation share, by their names in metrics.jsonl after train/ or eval/.

`step.metrics.pair_means` computes them; tables, charts and cards that show one take its word from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """How a metric is called."""

    long: str
    short: str
    """For the columns of a terminal."""
    lower_is_better: bool = False


PAIR_METRICS: Mapping[str, Words] = {
    "loss": Words("loss", "loss", lower_is_better=True),
    "loss_sft": Words("SFT loss", "sft", lower_is_better=True),
    "logps/chosen": Words("log-probability of chosen", "logp chosen"),
    "logps/rejected": Words("log-probability of rejected", "logp rejected"),
    "logratios_per_token/chosen": Words("nats per token of chosen", "nats chosen"),
    "logratios_per_token/rejected": Words("nats per token of rejected", "nats rejected"),
    "rewards/chosen": Words("reward of chosen", "chosen"),
    "rewards/rejected": Words("reward of rejected", "rejected"),
    "rewards/margins": Words("margin", "margin"),
    "rewards/accuracies": Words("accuracy", "acc"),
    "pairs": Words("pairs", "pairs"),
}
"""Every metric of `pair_means`."""


def words_of(name: str) -> Words | None:
    """Returns the words of a metric, with or without train/ or eval/ before its name; None of another metric."""
    return PAIR_METRICS.get(name.removeprefix("train/").removeprefix("eval/"))
