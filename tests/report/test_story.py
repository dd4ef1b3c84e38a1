"""What a page says about a run, for each case, with the run's own numbers."""

import math

import numpy as np
import pytest

from dpo.report.metrics import Split
from dpo.report.numbers import Correlation, calibration, correlation
from dpo.report.story import (
    calibration_sentences,
    length_sentence,
    split_sentences,
    token_sentence,
    where_from,
)
from tests.report.folders import eval_line, nats, record_of

CASES = {
    (
        0.5,
        -1.5,
    ): "Winners rose and losers fell. Winners went up by 0.500, losers went down by 1.50: the margin grew",
    (-0.5, -1.5): "Both rewards fell. Winners went down by 0.500, losers went down by 1.50: the margin grew by 1",
    (1.5, 0.5): "Both rewards rose. Winners went up by 1.50, losers went up by 0.500: the margin grew by 1",
    (
        -0.5,
        0.5,
    ): "Winners fell and losers rose. Winners went down by 0.500, losers went up by 0.500: the margin shrank by 1",
    (
        -1.0,
        -0.001,
    ): "Winners fell. Winners went down by 1.00, losers hardly moved (−0.00100): the margin shrank by 0.999",
    (-1.0, 0.0): "Winners fell. Winners went down by 1.00, losers hardly moved (0): the margin shrank by 1.00",
    (1.0, 0.0049): "Winners rose. Winners went up by 1.00, losers hardly moved (+0.00490): the margin grew by 0.995",
    (0.0, -1.0): "Losers fell. Winners hardly moved (0), losers went down by 1.00: the margin grew by 1.00",
    (0.0, 1.0): "Losers rose. Winners hardly moved (0), losers went up by 1.00: the margin shrank by 1.00",
    (-1.0, -1.001): "Both rewards fell. Winners went down by 1.00, losers went down by 1.00: the margin hardly moved.",
}
"""(winner, loser) -> what is said of them."""


@pytest.mark.parametrize("case", CASES)
def test_the_cases(case: tuple[float, float]) -> None:
    assert split_sentences(Split(100, *case), record_of())[0].startswith(CASES[case])


@pytest.mark.parametrize("case", [(-0.5, 0.5), (-1.0, 0.0), (0.0, 1.0)])
def test_a_move_against_the_labels_is_called_that(case: tuple[float, float]) -> None:
    assert split_sentences(Split(1, *case), record_of())[2].startswith("The policy moves against its labels: look ")


def test_each_case_means_something_else() -> None:
    cases = [(1, -1), (1, 0), (1, 1), (0, -1), (-1, -1), (-1, 1)]
    assert len({split_sentences(Split(1, *case), record_of())[2] for case in cases}) == len(cases)


def test_the_shares_of_the_margin_by_hand() -> None:
    """0.5 up and 1.5 down are 2: a quarter comes from winners. Of two falls there is no share to tell."""
    told = split_sentences(Split(1, 0.5, -1.5), record_of())[1]
    assert told == "Winner up +0.500 and loser down +1.50 add up to +2.00; 25% of it comes from winners."
    told = split_sentences(Split(1, -0.5, -1.5), record_of())[1]
    assert told == "Winner up −0.500 and loser down +1.50 add up to +1.00."


@pytest.mark.parametrize(("winner", "loser"), [(-1.5, -0.5), (0.5, 1.5), (-1.0, -1.001), (1.001, 1.0)])
def test_a_margin_that_did_not_grow_is_not_praised(winner: float, loser: float) -> None:
    """Both moved the same way, and the wrong one moved as far or further."""
    told = " ".join(split_sentences(Split(1, winner, loser), record_of()))
    assert "tells them apart no better than at its start: look whether chosen and rejected are swapped" in told
    assert "The margin grew" not in told and "more than the losers" not in told


def test_a_run_that_hardly_moved_says_so() -> None:
    told = split_sentences(Split(1, 0.004, -0.004), record_of())
    assert told[0].startswith("Neither reward has moved by more than 0.005")


@pytest.mark.parametrize(
    ("loss", "weight", "offered"),
    [
        ("dpo", 0.0, "; loss.sft_weight (for example 0.1) or loss.name dpop hold winners up."),
        ("dpo", 0.1, "; a larger loss.sft_weight or loss.name dpop hold winners up."),
        ("dpop", 0.0, "; loss.sft_weight (for example 0.1) holds winners up."),
        ("orpo", 0.0, "; loss.name dpop holds winners up."),
    ],
)
def test_only_keys_that_the_run_could_change_are_offered(loss: str, weight: float, offered: str) -> None:
    """dpop is dpop already, and orpo contains the SFT term."""
    told = split_sentences(Split(1, -1, -2), record_of(config={"loss.name": loss, "loss.sft_weight": weight}))
    assert told[2].endswith(offered)
    assert "sft_weight" not in split_sentences(Split(1, 1, -2), record_of())[2]


def test_where_rewards_are_counted_from() -> None:
    lines = [eval_line(0, 0, 0)]
    assert "0 is the reference, from which the policy started" in where_from(record_of(lines))
    other = {"loss.name": "dpo", "model.path": "sft", "reference.path": "base"}
    assert "0 is the reference; changes are counted from the first evaluation" in where_from(
        record_of(lines, config=other)
    )
    assert "from the first evaluation" in where_from(record_of(lines, config={"loss.name": "simpo"}))


def test_nats_per_token_of_both_sides() -> None:
    told = token_sentence(record_of([eval_line(5, -1, -2, **nats(-0.6, -3.0))]))
    assert told is not None and told.startswith("Per token, winners are at −0.600 nats and losers at −3.00: the mean ")
    assert token_sentence(record_of([eval_line(5, -1, -2)])) is None


# --- length and calibration -------------------------------------------------------------------------------------------

NUM_SETS = 400


def correlation_of(r: float, pairs: int) -> Correlation:
    """Two quantities of this many pairs with exactly this correlation: one of two orthogonal columns, and a mixture."""
    x = np.tile([1.0, -1.0, 1.0, -1.0], pairs // 4)
    other = np.tile([1.0, 1.0, -1.0, -1.0], pairs // 4)
    found = correlation(x, r * x + math.sqrt(1 - r * r) * other)
    assert found is not None and found.r == pytest.approx(r)
    return found


def test_the_interval_of_a_correlation_by_hand() -> None:
    """r = 0.5 of 100 pairs: z = artanh 0.5 = 0.54931, 1.96 / sqrt(97) = 0.19901, tanh of both ends."""
    found = correlation_of(0.5, 100)
    assert (found.low, found.high) == (pytest.approx(0.3366, abs=1e-4), pytest.approx(0.6341, abs=1e-4))


@pytest.mark.parametrize(
    ("r", "pairs", "words"),
    [
        (0.05, 10_000, "+0.0500 (95% interval +0.0304 to +0.0695), which explains 0% of the margins' variance: the "),
        (0.05, 10_000, "the margin hardly depends on length."),
        (0.05, 400, "no dependence on length that 400 pairs can show."),
        (0.2, 400, "which explains 4% of the margins' variance: the policy somewhat prefers longer"),
        (-0.6, 100, "which explains 36% of the margins' variance: the policy clearly prefers shorter"),
        (-0.6, 28, "28 pairs are too few for a verdict."),
        (0.3, 40, "no dependence on length that 40 pairs can show."),
    ],
)
def test_what_a_correlation_says(r: float, pairs: int, words: str) -> None:
    assert words in length_sentence(correlation_of(r, pairs))


def test_without_a_correlation_it_says_why() -> None:
    assert "all margins are equal" in length_sentence(None)


def most_by_chance(probability: float) -> int:
    """The number of NUM_SETS draws, each wrong with this probability, that is four standard deviations above the mean:
    20 + 4 * 4.4 = 37 of 400 at 5 %.
    """
    return math.ceil(NUM_SETS * probability + 4 * math.sqrt(NUM_SETS * probability * (1 - probability)))


@pytest.mark.parametrize("pairs", [30, 50, 500])
def test_unrelated_margins_and_lengths_get_no_verdict(pairs: int) -> None:
    """The interval of 95 % leaves 0 out in 5 % of draws."""
    rng = np.random.default_rng(pairs)
    told = [length_sentence(correlation(*rng.normal(size=(2, pairs)))) for _ in range(NUM_SETS)]
    assert sum("prefers" in text for text in told) <= most_by_chance(0.05)


def calibrated(rng: np.random.Generator, pairs: int, scale: float = 1.0) -> np.ndarray:
    """Margins whose winner is ahead with probability sigmoid(|margin|), times `scale`."""
    size = np.abs(rng.normal(size=pairs))
    is_right = rng.random(pairs) < 1 / (1 + np.exp(-size))
    return scale * np.where(is_right, size, -size)


@pytest.mark.parametrize("pairs", [30, 100, 1000])
def test_calibrated_pairs_are_called_calibrated(pairs: int) -> None:
    """Two standard errors leave 4.6 % out. The mean distance of 400 draws is that by chance within 5 %: in ten groups
    it varies by 0.76 / sqrt(10) = 24 % of itself from draw to draw, 1.2 % in the mean.
    """
    rng = np.random.default_rng(pairs)
    found = [calibration(calibrated(rng, pairs)) for _ in range(NUM_SETS)]
    told = [calibration_sentences(one)[0] for one in found]
    assert sum("confident" in text for text in told) <= most_by_chance(0.0455)
    assert sum(f"no difference that {pairs:,} pairs can show" in text for text in told) >= NUM_SETS / 2
    expected = np.mean([one.distance_by_chance for one in found])
    assert np.mean([one.distance for one in found]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("scale", "word"), [(2.0, "overconfident"), (0.4, "underconfident")])
def test_margins_that_are_too_large_or_too_small_are_found(scale: float, word: str) -> None:
    """1,000 pairs: |margin| is 0.80 in the mean, so that predicted and true shares differ by 0.1, or six standard
    errors of about 0.015.
    """
    rng = np.random.default_rng(0)
    told = [calibration_sentences(calibration(calibrated(rng, 1000, scale)))[0] for _ in range(20)]
    assert all(f": {word}. " in text for text in told)


def test_what_a_calibration_says_by_hand() -> None:
    """100 margins of ln 3, 60 of them right: 75 % against 60 %, standard error sqrt(100 * 3/16) / 100 = 4.33 %. One
    group, whose distance is 0.15, by chance sqrt(2/pi) * 0.0433 = 0.0345.
    """
    margins = math.log(3) * np.where(np.arange(100) < 60, 1, -1)
    total, groups = calibration_sentences(calibration(margins))
    assert total.startswith("It expects to be right in 75.0% of pairs and is in 60.0%: overconfident. By ")
    assert "the two differ by up to 8.7% in 95 of 100 sets" in total
    assert groups == "The mean distance from the diagonal is 0.150; that of calibrated pairs is 0.035 by chance."
    few = calibration_sentences(calibration(margins[50:79]))[0]
    assert "29 pairs are too few for a verdict" in few


def test_ties_add_no_chance() -> None:
    """Each is half right for certain."""
    found = calibration(np.zeros(50))
    assert (found.error, found.distance, found.distance_by_chance) == (0, 0, 0)
    assert "no difference that 50 pairs can show" in calibration_sentences(found)[0]
