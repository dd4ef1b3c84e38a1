"""The interface of all that shows a run while it goes on: TensorBoard, and trackers. Without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from dpo.base.errors import Preempted
from dpo.config import Config

Ending = Literal["done", "preempted", "failed"]
"""How a start of a run ends: all steps are made and the model is exported, or it was asked to stop, or it failed."""


@dataclass(frozen=True)
class Answer:
    """A prompt with the answers of reference and policy, as texts."""

    prompt: str
    reference: str
    policy: str


def ending_of(failure: BaseException | None) -> Ending:
    """Returns the ending of a start, given the exception that ends it."""
    if failure is None:
        return "done"
    return "preempted" if isinstance(failure, Preempted) else "failed"


class Sink(Protocol):
    """Shows one run, from the first step of this start on. Only rank 0 has sinks."""

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a point to the chart of each metric; names as in metrics.jsonl."""

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Adds the distribution of `values` after `step` steps; `name` is that of the metric that is their mean."""

    def text(self, name: str, text: str) -> None:
        """Shows a text of many lines about this start, such as `config`, unchanged."""

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Shows the answers of policy and reference side by side, after `step` steps."""

    def hparams(self, config: Config) -> None:
        """Records the config, by which runs are compared; a later start replaces it."""

    def close(self, ending: Ending = "done") -> None:
        """Waits until all is written, and closes files and connections. The exported model exists by then: a tracker
        may wait for its network.
        """
