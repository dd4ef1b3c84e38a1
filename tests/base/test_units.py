"""Numbers with units, by hand."""

import pytest

from dpo.base.units import shown_bytes, shown_duration, shown_rate, shown_seconds


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.0 KiB"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (1.5 * 2**30, "1.5 GiB"), (2**40, "1,024.0 GiB")],
)
def test_bytes(number: float, text: str) -> None:
    assert shown_bytes(number) == text


def test_rates() -> None:
    assert shown_rate(1.414e9) == "1.41 GB/s"
    assert shown_rate(9.99e8) == "999 MB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.05, "50.0 ms"), (0.5, "0.50 s"), (119, "119.0 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert shown_duration(seconds) == text


def test_seconds_do_not_become_minutes() -> None:
    assert shown_seconds(1234.5) == "1,234.5 s"
    assert [shown_seconds(n) for n in (0.0, 1e-4, 8.9e-5, 1.7e-7)] == ["0.0 ms", "0.1 ms", "89 µs", "0.17 µs"]
