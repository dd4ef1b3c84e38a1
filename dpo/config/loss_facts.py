"""The facts of each loss that config, launch and reports need, without torch: its name, inputs, rewards and keys.

The functions are in `LOSSES` of `dpo/step/losses.py`, under the same names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

LossName = Literal["dpo", "ipo", "hinge", "robust", "apo_zero", "apo_down", "dpop", "simpo", "orpo", "sft"]
"""The choices of `loss.name`: the names of `LOSS_FACTS`."""


@dataclass(frozen=True)
class LossFacts:
    """The inputs of a loss beside the log-probabilities of the policy, its rewards, and the keys that it takes."""

    uses_reference: bool
    """The loss compares with a reference, whose log-probabilities are computed."""
    rewards: Literal["implicit", "per_token"] | None
    """The rewards of a completion of n tokens: beta (pi_logp - ref_logp), which needs a reference, or beta pi_logp / n;
    None: the loss has no rewards, hence no accuracies and margins."""
    smooths: bool = False
    """The loss takes `loss.label_smoothing`."""
    normalizes: bool = True
    """The loss takes `loss.length_normalized`; a loss that does not is a mean per token by definition."""
    includes_sft: bool = False
    """The loss contains the SFT term with weight 1, so it does not take `loss.sft_weight`."""
    own_key: str | None = None
    """The key of `loss` that this loss alone takes."""
    is_bradley_terry: bool = False
    """The loss is least where sigmoid(beta h) is the probability that the winner is preferred, as in the model of
    Bradley and Terry, so that this probability can be compared with held-out labels. Label smoothing, normalized
    lengths and a margin per pair move the optimum."""
    offsets: bool = False
    """The loss takes a margin per pair, from the column that a source names in `columns`."""

    @property
    def compares(self) -> bool:
        """Returns whether the loss compares winners with losers; one that does not takes demonstrations too, and no
        loser is computed.
        """
        return self.rewards is not None


LOSS_FACTS: Mapping[LossName, LossFacts] = {
    "dpo": LossFacts(uses_reference=True, rewards="implicit", smooths=True, is_bradley_terry=True, offsets=True),
    "ipo": LossFacts(uses_reference=True, rewards="implicit"),
    "hinge": LossFacts(uses_reference=True, rewards="implicit"),
    "robust": LossFacts(uses_reference=True, rewards="implicit", smooths=True, is_bradley_terry=True),
    "apo_zero": LossFacts(uses_reference=True, rewards="implicit"),
    "apo_down": LossFacts(uses_reference=True, rewards="implicit"),
    "dpop": LossFacts(uses_reference=True, rewards="implicit", own_key="dpop_lambda"),
    "simpo": LossFacts(uses_reference=False, rewards="per_token", normalizes=False, own_key="gamma"),
    "orpo": LossFacts(uses_reference=False, rewards="per_token", normalizes=False, includes_sft=True),
    "sft": LossFacts(uses_reference=False, rewards=None, normalizes=False, includes_sft=True),
}
"""The facts of each loss by `loss.name`."""


def losses_that(holds: Callable[[LossFacts], bool]) -> list[str]:
    """Returns the names of the losses for whose facts `holds` is true, in the order of the table."""
    return [name for name, facts in LOSS_FACTS.items() if holds(facts)]
