"""The warning that a policy unlearns its good answers, from the lines of metrics.jsonl; without torch."""

import math
import statistics
from collections.abc import Mapping, Sequence

from dpo.run_folder.files import LAST_STEPS

WINNERS = "logratios_per_token/chosen"
FALLEN = -0.5
"""Nats per token of the winners against the reference below which a run is warned of."""
ADVICE = "a larger loss.beta, a smaller optim.lr or fewer steps keep the policy nearer to its reference"


def nats_per_token(lines: Sequence[Mapping[str, float]], name: str = WINNERS) -> float | None:
    """Returns the newest nats per token of an evaluation, or without evaluations the mean of the last LAST_STEPS steps;
    None without a reference.
    """
    found = [line[f"eval/{name}"] for line in lines if f"eval/{name}" in line][-1:]
    found = found or [line[f"train/{name}"] for line in lines if f"train/{name}" in line][-LAST_STEPS:]
    return statistics.fmean(found) if found else None


def fallen_warning(lines: Sequence[Mapping[str, float]]) -> str | None:
    """Returns the warning that winners are below FALLEN nats per token; None where they are not."""
    nats = nats_per_token(lines)
    if nats is None or nats >= FALLEN:
        return None
    pairs = [line["eval/pairs"] for line in lines if "eval/pairs" in line]
    over = f"over {pairs[-1]:,.0f} held-out pairs" if pairs else f"over the pairs of the last {LAST_STEPS} steps"
    what = f"the mean {over} of (log pi − log ref of the winner) / its tokens"
    odds = f"a token of a winner is {math.exp(nats):.0%} as likely as under the reference, in the geometric mean"
    where = f"winners are at {_signed(nats)} nats per token, below {_signed(FALLEN)}: {what}; {odds}"
    return f"{where}. The policy unlearns its good answers: {ADVICE}."


def _signed(nats: float) -> str:
    return f"{nats:+.3g}".replace("-", "−")
