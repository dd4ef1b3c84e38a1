"""Ticks and numbers as people read them."""

import pytest

from dpo.report.scales import (
    Scale,
    scientific,
    shown,
    shown_count,
    shown_error,
    shown_hours,
    signed,
    tick_labels,
    ticks,
    value_text,
    widened,
)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 150, ["0", "50", "100", "150"]),
        (-0.3, 1.1, ["0.0", "0.5", "1.0"]),
        (0, 1e-6, ["0", "2e-7", "4e-7", "6e-7", "8e-7", "1e-6"]),
        (0, 12_000, ["0", "5,000", "10,000"]),
        (-3.9, -0.2, ["−3", "−2", "−1"]),
        (0.62, 0.7, ["0.62", "0.64", "0.66", "0.68", "0.70"]),
    ],
)
def test_ticks_are_round_and_few(low: float, high: float, labels: list[str]) -> None:
    assert tick_labels(ticks(low, high)) == labels


@pytest.mark.parametrize("span", [1.0, 1.9, 2.0, 4.99, 5.0, 7.3])
@pytest.mark.parametrize("low", [-1.01, 0.0, 0.3])
def test_there_are_two_to_six_ticks(low: float, span: float) -> None:
    assert 2 <= len(ticks(low, low + span)) <= 6


def test_a_range_without_width_gets_one() -> None:
    assert widened(2.0, 2.0) == (1.0, 3.0)
    assert widened(0.0, 0.0) == (-0.5, 0.5)
    assert widened(0.0, 10.0, part=0.1) == (-1.0, 11.0)


def test_a_scale_by_hand() -> None:
    """From 10 to 20 on 100 to 0, as an axis that points upwards: 15 lies in the middle."""
    scale = Scale(10, 20, 100, 0)
    assert (scale(10), scale(15), scale(20)) == (100, 50, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (12.345, "12.3"),
        (0.1234, "0.123"),
        (5e-7, "5e-7"),
        (0, "0"),
        (-0.0, "0"),
        (-2.5, "−2.50"),
        (None, "–"),
    ],
)
def test_numbers_have_about_three_digits(value: float | None, text: str) -> None:
    assert shown(value) == text


def test_errors_have_one_digit() -> None:
    """9.6 is 10, with the power of the digit before rounding."""
    errors = (0.00417, 8.33e-4, 2.4, 31.0, 4.96e-7, 0.0, 9.6)
    assert [shown_error(error) for error in errors] == ["0.004", "0.0008", "2", "30", "5e-7", "0", "10"]


def test_other_forms() -> None:
    assert (signed(0.5), signed(-0.5), signed(0.0)) == ("+0.500", "−0.500", "0")
    assert (scientific(1.5e8), scientific(0.0)) == ("1.5e8", "0")
    assert [shown_count(value) for value in (999, 12_345, 1_234_567, 2.5e9)] == ["999", "12.3 k", "1.23 M", "2.50 G"]
    assert [shown_hours(hours) for hours in (12.34, 0.5, 0.005)] == ["12.3 h", "30 min", "18 s"]
    assert [value_text(value) for value in (3e-5, 0.001, 0.1, 2.0, None, True, "dpo")] == [
        "3e-5",
        "0.001",
        "0.1",
        "2",
        "null",
        "true",
        "dpo",
    ]
