"""Sentences about a run's numbers, in plain English."""

from collections.abc import Mapping

from dpo.report.metrics import Split
from dpo.report.numbers import Calibration, Correlation
from dpo.report.record import Record
from dpo.report.scales import shown, signed
from dpo.run_folder.fallen import ADVICE, nats_per_token

HARDLY = 0.005
"""The change of a reward below which it has hardly moved."""
FEWEST = 30
"""Pairs below which a page gives no verdict on length and calibration."""


# --- why both rewards fall --------------------------------------------------------------------------------------------


def split_sentences(split: Split, record: Record) -> list[str]:
    """Returns what the split of the margin says about this run: the case, and what it means."""
    case = (direction(split.winner), direction(split.loser))
    text, meaning = CASES[case]
    if case == (0, 0):
        return [text, meaning]
    if case in SAME_WAY and split.margin < HARDLY:
        meaning = f"{SAME_WAY[case]}, so that the policy tells them apart no better than at its start: {LABELS}."
    remedy = _remedy(record) if case == (-1, -1) else ""
    margin = {1: "grew by {}", 0: "hardly moved", -1: "shrank by {}"}[direction(split.margin)]
    moves = f"{_move('Winners', split.winner)}, {_move('losers', split.loser)}"
    return [f"{text} {moves}: the margin {margin.format(shown(abs(split.margin)))}.", _shares(split), meaning + remedy]


def direction(change: float) -> int:
    """Returns 1 for a change upwards, -1 for one downwards, 0 for one of less than HARDLY."""
    return 0 if abs(change) < HARDLY else 1 if change > 0 else -1


LABELS = "look whether chosen and rejected are swapped in the data, and try a smaller optim.lr"
AGAINST = f"The policy moves against its labels: {LABELS}."
CASES: Mapping[tuple[int, int], tuple[str, str]] = {
    (1, -1): ("Winners rose and losers fell.", "Both parts widen the margin: as it should be."),
    (1, 0): ("Winners rose.", "The margin grew because of its winners alone."),
    (1, 1): (
        "Both rewards rose.",
        "The policy learnt what all answers of these data have in common, such as style and length, and the winners' "
        "ways more than the losers'. This is usual where the reference was not fine-tuned on such answers.",
    ),
    (0, -1): (
        "Losers fell.",
        "The margin grew because of its losers alone: winners are about as likely as at the start.",
    ),
    (0, 0): (
        f"Neither reward has moved by more than {HARDLY:g}: the policy is still about where it began.",
        "Try more steps, a larger optim.lr or a shorter warm-up.",
    ),
    (0, 1): ("Losers rose.", AGAINST),
    (-1, -1): (
        "Both rewards fell.",
        "The margin grew all the same, because losers fell further. DPO's loss sees the difference alone: it is "
        "content with lowering both as long as losers fall faster, and the probability goes to answers in no pair. "
        "Winner and loser share words, so that what lowers a loser lowers its winner too; a small fall is common and "
        "harmless.",
    ),
    (-1, 0): ("Winners fell.", AGAINST),
    (-1, 1): ("Winners fell and losers rose.", AGAINST),
}
"""Directions of (winners, losers) -> the case, and what it means."""

SAME_WAY = {
    (-1, -1): "Winners fell as far as losers or further",
    (1, 1): "Losers rose as far as winners or further",
}
"""What two of the cases are where the margin has not grown."""


def _move(side: str, change: float) -> str:
    if direction(change) == 0:
        return f"{side} hardly moved ({signed(change)})"
    return f"{side} went {'up' if change > 0 else 'down'} by {shown(abs(change))}"


def _shares(split: Split) -> str:
    """Returns how much of the change of the margin comes from each side."""
    text = f"Winner up {signed(split.winner)} and loser down {signed(-split.loser)} add up to {signed(split.margin)}"
    if split.winner > 0 and split.loser < 0:
        return f"{text}; {split.winner / split.margin:.0%} of it comes from winners."
    return f"{text}."


def _remedy(record: Record) -> str:
    """Returns the keys of the config that hold winners up, for the case in which both rewards fell."""
    keys = []
    if record.facts is None or not record.facts.includes_sft:
        has_term = (record.config.get("loss.sft_weight") or 0) > 0
        keys.append("a larger loss.sft_weight" if has_term else "loss.sft_weight (for example 0.1)")
    if record.config.get("loss.name") != "dpop":
        keys.append("loss.name dpop")
    verb = "holds" if len(keys) == 1 else "hold"
    held = f"; {' or '.join(keys)} {verb} winners up" if keys else ""
    return f" Where answers get worse, {ADVICE}{held}."


def where_from(record: Record) -> str:
    """Returns from where the changes of rewards are counted, and in what unit."""
    first = f"changes are counted from the first {'evaluation' if record.evals else 'training step'}"
    if record.facts is not None and record.facts.rewards == "per_token":
        return f"Rewards are beta times the mean log-probability per token; {first}."
    text = "Rewards are beta times (log pi − log ref), summed over an answer: 0 is the reference"
    return f"{text}, from which the policy started." if record.begins_at_reference else f"{text}; {first}."


def token_sentence(record: Record) -> str | None:
    """Returns the nats per token of both sides; None without a reference."""
    chosen, rejected = (nats_per_token(record.lines, f"logratios_per_token/{side}") for side in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return None
    what = "the mean over pairs of (log pi − log ref of the answer) / its tokens"
    return f"Per token, winners are at {signed(chosen)} nats and losers at {signed(rejected)}: {what}."


# --- length and calibration -------------------------------------------------------------------------------------------


def length_sentence(found: Correlation | None) -> str:
    """Returns what the correlation of margin and difference in length says."""
    if found is None:
        return (
            "There is no correlation to tell: there are under four pairs, or all differ by the same number of tokens, "
            "or all margins are equal."
        )
    interval = f"95% interval {signed(found.low)} to {signed(found.high)}"
    text = f"Correlation {signed(found.r)} ({interval}), which explains {found.r**2:.0%} of the margins' variance"
    if found.pairs < FEWEST:
        return f"{text}: {_too_few(found.pairs)}."
    if max(abs(found.low), abs(found.high)) < 0.1:
        return f"{text}: the margin hardly depends on length."
    if found.low <= 0 <= found.high:
        return f"{text}: no dependence on length that {found.pairs:,} pairs can show."
    which = "longer" if found.r > 0 else "shorter"
    how = "clearly" if min(abs(found.low), abs(found.high)) >= 0.3 else "somewhat"
    return f"{text}: the policy {how} prefers {which} answers; look whether that is the preference you want."


def calibration_sentences(found: Calibration) -> list[str]:
    """Returns how predicted and observed preferences differ, in all pairs and by groups, beside what chance does."""
    difference = found.predicted - found.observed
    text = f"It expects to be right in {found.predicted:.1%} of pairs and is in {found.observed:.1%}"
    if found.pairs < FEWEST:
        verdict = _too_few(found.pairs)
    elif abs(difference) <= 2 * found.error:
        verdict = f"no difference that {found.pairs:,} pairs can show"
    else:
        verdict = "overconfident" if difference > 0 else "underconfident"
    sets = "in 95 of 100 sets of calibrated, independent pairs"
    chance = f"By chance alone the two differ by up to {2 * found.error:.1%} {sets}."
    distance = f"The mean distance from the diagonal is {found.distance:.3f}"
    expected = f"that of calibrated pairs is {found.distance_by_chance:.3f} by chance"
    return [f"{text}: {verdict}. {chance}", f"{distance}; {expected}."]


def _too_few(pairs: int) -> str:
    return f"{pairs:,} pairs are too few for a verdict"
