"""The facts of each loss that config, launch and reports need, without torch: its name, inputs and keys.

The functions are in `LOSSES` of `dpo/step/losses.py`, under the same names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

LossName = Literal["dpo", "ipo", "hinge", "robust", "sft"]
"""The choices of `loss.name`: the names of `LOSS_FACTS`."""


@dataclass(frozen=True)
class LossFacts:
    """The inputs of a loss beside the log-probabilities of the policy, and the keys of `loss` that it takes."""

    uses_reference: bool
    """The loss compares with a reference, whose log-probabilities are computed; other losses have no rewards."""
    smooths: bool
    """The loss takes `loss.label_smoothing`."""
    normalizes: bool
    """The loss takes `loss.length_normalized`; a loss that does not is a mean per token by definition."""
    includes_sft: bool = False
    """The loss contains the SFT term with weight 1, so it does not take `loss.sft_weight`."""


LOSS_FACTS: Mapping[LossName, LossFacts] = {
    "dpo": LossFacts(uses_reference=True, smooths=True, normalizes=True),
    "ipo": LossFacts(uses_reference=True, smooths=False, normalizes=True),
    "hinge": LossFacts(uses_reference=True, smooths=False, normalizes=True),
    "robust": LossFacts(uses_reference=True, smooths=True, normalizes=True),
    "sft": LossFacts(uses_reference=False, smooths=False, normalizes=False, includes_sft=True),
}
"""The facts of each loss by `loss.name`."""


def losses_that(holds: Callable[[LossFacts], bool]) -> list[str]:
    """Returns the names of the losses for whose facts `holds` is true, in the order of the table."""
    return [name for name, facts in LOSS_FACTS.items() if holds(facts)]
