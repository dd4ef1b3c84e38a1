"""Numbers of single pairs and of metrics.jsonl, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from dpo.report.listings import origin_rows
from dpo.report.metrics import MOST_POINTS, Split, cost, curve, last_split, latest, smooth, splits
from dpo.report.numbers import (
    Group,
    by_source,
    calibration,
    correlation,
    grouped,
    histogram,
    shared_edges,
    thinned,
)
from dpo.report.one_run import key_numbers
from tests.report.folders import eval_line, pairs_of, record_of, train_line

# --- single pairs -----------------------------------------------------------------------------------------------------


def test_bins_are_shared_and_leave_the_tails_out() -> None:
    """0 to 200: half a percent of 200 steps is 1, so that bins reach from 1 to 199; the other column lies within."""
    edges = shared_edges([np.arange(201.0), np.array([50.0, 60.0])], num_bins=2)
    assert edges.tolist() == [1, 100, 199]


def test_bins_of_a_single_value_have_a_width() -> None:
    assert shared_edges([np.full(4, 3.0)], num_bins=2).tolist() == [2.5, 3.0, 3.5]


def test_a_histogram_by_hand() -> None:
    """0 and 0.5 lie in the first bin, 1 and (on the last edge) 2 in the second, -1 and 5 in none; the mean is 7.5/6."""
    found = histogram(np.array([-1, 0, 0.5, 1, 2, 5]), np.array([0.0, 1, 2]))
    assert (found.counts.tolist(), found.beyond, found.mean) == ([2, 2], 2, 1.25)


def test_the_correlation_by_hand() -> None:
    """Deviations -1, 0, 0, 1 and -2.5, -0.5, -0.5, 3.5: 6 / sqrt(2 * 19)."""
    found = correlation(np.array([1, 2, 2, 3]), np.array([2, 4, 4, 8]))
    assert found is not None and found.r == pytest.approx(6 / math.sqrt(2 * 19))
    found = correlation(np.array([1, 2, 3, 4]), np.array([3, 2, 1, 0]))
    assert found is not None and (found.r, found.high) == (pytest.approx(-1), pytest.approx(-1))


@pytest.mark.parametrize("x", [[1, 2, 3], [7, 7, 7, 7]])
def test_there_is_no_correlation_of_three_pairs_or_of_a_constant(x: list[int]) -> None:
    assert correlation(np.array(x), np.arange(len(x))) is None


def test_groups_by_hand() -> None:
    """Six pairs in three groups of two, in the order of the last column."""
    by = np.array([6, 5, 4, 3, 2, 1])
    groups = grouped(by * 10.0, np.array([0, 0, 0, 0, 0, 6.0]), by, num_groups=3)
    assert groups == [Group(2, 1, 2, 15, 3), Group(2, 3, 4, 35, 0), Group(2, 5, 6, 55, 0)]


def test_equal_pairs_are_in_one_group() -> None:
    """Three of four pairs are equal: two groups, though four were asked for."""
    groups = grouped(np.arange(4.0), np.arange(4.0), np.array([1, 1, 1, 2]), num_groups=4)
    assert [group.pairs for group in groups] == [3, 1]


def test_thinning_is_even_and_always_the_same() -> None:
    assert thinned(10, 4).tolist() == [0, 2, 5, 7]
    assert thinned(3, 4).tolist() == [0, 1, 2]


def test_calibration_by_hand() -> None:
    """Margins of ln 3 predict 3/4 and three of four are right; of ln 9 predict 9/10, and two of four are: the mean
    distance is (4 * 0 + 4 * 0.4) / 8. The sign decides, not the size.
    """
    margins = np.array([1, -1, 1, 1, 2, -2, 2, -2]) * math.log(3)
    found = calibration(margins, num_groups=2)
    assert [(group.pairs, group.x, group.y) for group in found.groups] == [
        (4, pytest.approx(0.75), 0.75),
        (4, pytest.approx(0.9), 0.5),
    ]
    assert found.distance == pytest.approx(0.2)
    assert found.errors == (pytest.approx(math.sqrt(3 / 16 / 4)), pytest.approx(math.sqrt(0.09 / 4)))


def test_ties_are_half_right() -> None:
    """Before training all margins are 0: predicted and observed are one half."""
    (group,) = calibration(np.zeros(5)).groups
    assert (group.x, group.y) == (0.5, 0.5)


def test_sources_by_hand() -> None:
    """Pairs 0 and 2 are of the second source: margins 2 - 1 and -1 - 0, one of two right; the third source has none."""
    pairs = pairs_of([2, 5, -1], [1, 6, 0], beta=1.0)
    pairs |= {"source": np.array([1, 0, 1]), "sources": np.array(["a", "b", "c"])}
    first, second = by_source(pairs)
    assert (first.source, first.pairs, first.accuracy, first.margin) == ("a", 1, 0.0, -1.0)
    assert (second.source, second.pairs, second.accuracy, second.margin) == ("b", 2, 0.5, 0.0)
    assert (second.chosen, second.rejected, second.tokens_chosen, second.tokens_rejected) == (0.5, 0.5, 10, 5)


def test_a_source_without_rewards_has_lengths_alone() -> None:
    pairs = {
        name: column for name, column in pairs_of([1], [1]).items() if name in ("tokens_chosen", "source", "sources")
    }
    (row,) = by_source(pairs)
    assert (row.accuracy, row.margin, row.tokens_rejected, row.tokens_chosen) == (None, None, None, 10)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_a_long_curve_is_shown_by_means() -> None:
    """800 steps: 400 points, the first of steps 1 and 2."""
    lines = [{"step": step, "train/loss": float(step % 2)} for step in range(1, 2 * MOST_POINTS + 1)]
    points = curve(lines, "train/loss")
    assert len(points) == MOST_POINTS
    assert points[0] == (1.5, 0.5)


def test_accuracies_of_a_policy_that_is_its_reference_are_left_out() -> None:
    """All rewards are 0 up to rounding before the first step, where every tie counts as wrong."""
    lines = [eval_line(0, 1e-8, 0.0, accuracy=0.1), eval_line(10, 0.2, 0.1, accuracy=0.7)]
    assert curve(lines, "eval/rewards/accuracies") == [(10, 0.7)]
    assert len(curve(lines, "eval/rewards/margins")) == 2


def test_the_running_mean_by_hand() -> None:
    """50 points: each with the one before and the one after it; at the ends with one of them."""
    means = smooth([(float(step), float(step**2)) for step in range(50)])
    assert means[0] == (0, 0.5)
    assert means[3] == (3, pytest.approx((4 + 9 + 16) / 3))
    assert means[49] == (49, pytest.approx((48**2 + 49**2) / 2))
    assert smooth([(0.0, 1.0), (1.0, 5.0)]) == [(0, 1), (1, 5)]


def test_the_newest_value_is_a_mean_of_ten_steps_in_training_alone() -> None:
    lines = [*(train_line(step, loss=float(step)) for step in range(1, 21)), eval_line(10, 1, 0), eval_line(20, 3, 0)]
    record = record_of(lines)
    assert latest(record, "train/loss") == 15.5
    assert latest(record, "eval/rewards/chosen") == 3
    assert latest(record, "eval/nothing") is None


def test_the_accuracy_of_a_policy_that_is_its_reference_is_no_number_of_the_page() -> None:
    record = record_of([eval_line(0, 0.0, 0.0, accuracy=0.0)])
    assert latest(record, "eval/rewards/accuracies") is None
    assert [meaning for _, meaning in key_numbers(record, cost(record))][1:3] == ["held-out margin", "held-out loss"]


def test_the_split_by_hand() -> None:
    """From a reference that the policy started from, whatever the first evaluation says."""
    record = record_of([eval_line(5, -0.5, -0.75), eval_line(10, -1, -3)])
    assert splits(record) == [Split(5, -0.5, -0.75), Split(10, -1, -3)]
    assert last_split(record, splits(record)) == Split(10, -1, -3)
    assert Split(10, -1, -3).margin == 2


@pytest.mark.parametrize(
    "config",
    [
        {"loss.name": "simpo"},
        {"loss.name": "dpo"},
        {"loss.name": "dpo", "model.path": "sft", "reference.path": "base"},
    ],
)
def test_changes_are_counted_from_the_evaluation_before_the_first_step(config: dict[str, str]) -> None:
    """Rewards are not 0 there without a reference, or with one that is another model than where training began."""
    record = record_of([eval_line(0, -2, -1.5), eval_line(10, -1, -3)], config=config)
    assert splits(record) == [Split(0, 0, 0), Split(10, 1, -1.5)]


@pytest.mark.parametrize(("reference", "first"), [("sft", 0.0), (None, 0.0), ("base", -2.0)])
def test_without_that_evaluation_a_run_from_another_reference_is_counted_from_its_first_line(
    reference: str | None, first: float
) -> None:
    config = {"loss.name": "dpo", "model.path": "sft", "reference.path": reference}
    record = record_of([train_line(1, -2.0, -1.0), train_line(2, -3.0, -1.0)], config=config)
    assert [split.winner for split in splits(record)] == [-2 - first, -3 - first]


def test_without_evaluations_the_split_is_of_the_last_ten_steps() -> None:
    record = record_of([train_line(step, chosen=float(step), rejected=0.0) for step in range(1, 21)])
    assert last_split(record, splits(record)) == Split(20, 15.5, 0)
    assert last_split(record_of(), []) is None


def test_hours_by_hand() -> None:
    """1,800 steps of 2 s and 1,800 s of the reference: 1.5 h, of 8 ranks and after a restart of 16: 12 to 24."""
    lines = [train_line(step) for step in range(1, 1801)] + [{"step": 0, "reference/seconds": 1800.0}]
    starts = ({"ranks": 8}, {"ranks": 16, "layout": {"devices": {"NVIDIA H100": 16}}})
    spent = cost(record_of(lines, starts=starts))
    assert (spent.hours, spent.least_device_hours, spent.most_device_hours) == (1.5, 12, 24)
    assert (spent.devices, spent.has_gpus) == ("16 × NVIDIA H100", True)
    assert not cost(record_of(lines, starts=({"layout": {"devices": {"cpu": 2}}},))).has_gpus
    assert cost(record_of(starts=({"layout": "torn"},))).devices == ""


def test_a_zero_of_provenance_is_told_and_a_false_is_not() -> None:
    record = record_of(starts=({"version": "0", "dirty": False, "ranks": 0, "commit": None},))
    assert origin_rows(record, "cpu") == [("version", "0"), ("ranks", "0"), ("devices", "cpu"), ("starts", "1")]
