"""What a page says about a run, for each case, with the run's own numbers."""

import numpy as np
import pytest

from dpo.report.metrics import Split
from dpo.report.numbers import calibration, calibration_error
from dpo.report.story import (
    calibration_sentence,
    length_sentence,
    split_sentences,
    token_sentence,
    warning,
    where_from,
)
from tests.report.folders import eval_line, pairs_of, record_of

CASES = {
    (0.5, -1.5): "Winners rose and losers fell. Winners went up by 0.500, losers went down by 1.50",
    (-0.5, -1.5): "Both rewards fell. Winners went down by 0.500, losers went down by 1.50",
    (1.5, 0.5): "Both rewards rose. Winners went up by 1.50, losers went up by 0.500",
    (-0.5, 0.5): "Winners fell and losers rose. Winners went down by 0.500, losers went up by 0.500",
}
"""(winner, loser) -> what is said of them."""
MARGINS = ("grew by 2.00", "grew by 1.00", "grew by 1.00", "shrank by 1.00")


@pytest.mark.parametrize(("case", "margin"), list(zip(CASES, MARGINS, strict=True)))
def test_the_four_cases(case: tuple[float, float], margin: str) -> None:
    sentences = split_sentences(Split(100, *case), record_of())
    assert sentences[0] == f"{CASES[case]}: the margin {margin}."


def test_each_case_means_something_else() -> None:
    assert len({split_sentences(Split(1, *case), record_of())[2] for case in CASES}) == 4


def test_the_shares_of_the_margin_by_hand() -> None:
    """0.5 up and 1.5 down are 2: a quarter comes from winners. Of two falls there is no share to tell."""
    told = split_sentences(Split(1, 0.5, -1.5), record_of())[1]
    assert told == "Winner up +0.500 and loser down +1.50 add up to +2.00; 25% of it comes from winners."
    told = split_sentences(Split(1, -0.5, -1.5), record_of())[1]
    assert told == "Winner up −0.500 and loser down +1.50 add up to +1.00."


@pytest.mark.parametrize(("winner", "loser"), [(-1.5, -0.5), (0.5, 1.5)])
def test_a_margin_that_shrank_is_not_praised(winner: float, loser: float) -> None:
    """Both moved the same way, and the wrong one moved further."""
    told = " ".join(split_sentences(Split(1, winner, loser), record_of()))
    assert "the margin shrank by 1.00" in told and "look at the labels" in told
    assert "The margin grew" not in told and "more than the losers" not in told


def test_a_run_that_hardly_moved_says_so() -> None:
    told = split_sentences(Split(1, 0.004, -0.004), record_of())
    assert told[0].startswith("Neither reward has moved by more than 0.005")


@pytest.mark.parametrize(
    ("loss", "offered"),
    [
        ("dpo", "; loss.sft_weight (for example 0.1) or loss.name dpop hold winners up."),
        ("dpop", "; loss.sft_weight (for example 0.1) holds winners up."),
        ("orpo", "; loss.name dpop holds winners up."),
    ],
)
def test_only_keys_that_the_loss_takes_are_offered(loss: str, offered: str) -> None:
    """dpop is dpop already, and orpo contains the SFT term."""
    told = split_sentences(Split(1, -1, -2), record_of(config={"loss.name": loss}))
    assert told[2].endswith(offered)
    assert "sft_weight" not in split_sentences(Split(1, 1, -2), record_of())[2]


def test_where_rewards_are_counted_from() -> None:
    lines = [eval_line(0, 0, 0)]
    assert "0 is the reference" in where_from(record_of(lines))
    assert "from the first evaluation" in where_from(record_of(lines, config={"loss.name": "simpo"}))


def test_the_warning_says_what_is_averaged() -> None:
    """-8 and -4 nats on 10 tokens are -0.6 in the mean, e^-0.6 = 55 %; losers have 5 tokens: -10 and -20 are -3."""
    pairs = pairs_of([-8, -4], [-10, -20])
    told = warning(pairs)
    assert told is not None and "−0.600 nats per token, below −0.500: the mean over 2 pairs" in told
    assert "(log pi − log ref of the winner) / its tokens" in told and "55% as likely" in told
    assert "winners are at −0.600 nats and losers at −3.00" in str(token_sentence(pairs))


def test_there_is_no_warning_above_half_a_nat_or_without_a_reference() -> None:
    pairs = pairs_of([-5, -5], [0, 0])
    assert warning(pairs) is None
    assert warning(pairs_of([-5.1, -5], [0, 0])) is not None
    alone = {name: column for name, column in pairs.items() if not name.startswith("logratios")}
    assert warning(alone) is None and token_sentence(alone) is None


@pytest.mark.parametrize(
    ("r", "words"),
    [
        (0.05, "hardly depends on length"),
        (0.2, "+0.200, which explains 4% of the margins' variance: the policy somewhat prefers longer"),
        (-0.6, "−0.600, which explains 36% of the margins' variance: the policy clearly prefers shorter"),
        (None, "no correlation"),
    ],
)
def test_what_a_correlation_says(r: float | None, words: str) -> None:
    assert words in length_sentence(r)


@pytest.mark.parametrize(
    ("margins", "words"),
    [
        ([2.0, -2.0], "expects to be right in 88.1% of pairs and is in 50.0%"),
        ([2.0, -2.0], "0.381: overconfident"),
        ([0.1, 0.1], "0.475: underconfident"),
        ([0.0, 0.0], "0.000: well calibrated"),
    ],
)
def test_what_a_calibration_says(margins: list[float], words: str) -> None:
    """sigmoid(2) is 0.881, sigmoid(0.1) 0.525."""
    groups = calibration(np.array(margins))
    assert words in calibration_sentence(groups, calibration_error(groups))
