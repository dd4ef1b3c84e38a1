"""Loss spikes: hand-derived limits, and the number of false alarms in series without noise."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpo.run_folder.files import read_metrics
from dpo.train.spikes import FEWEST, WINDOW, find_spike, losses_of
from tests.support.runs import logged, run, run_until, save_six_steps, six_steps


def told(losses: Sequence[float]) -> list[int]:
    """The places of the losses of a series that are told, each compared with all before it."""
    return [at for at, loss in enumerate(losses) if find_spike(losses[:at], loss)]


WAVE = [(-1.0) ** step for step in range(WINDOW)]
"""Mean 0, sigma 1."""


@pytest.mark.parametrize(("loss", "is_spike"), [(6.0, False), (6.001, True), (-100.0, False)])
def test_six_sigma_above_the_mean(loss: float, is_spike: bool) -> None:
    assert (find_spike(WAVE, loss) is not None) is is_spike


def test_the_line() -> None:
    spike = find_spike([2 + each / 4 for each in WAVE], 4.5)
    assert str(spike) == "the loss 4.5 is 10.0 sigma above the mean of the last 128, 2, with a sigma of 0.25"


def test_only_the_last_losses_count() -> None:
    assert find_spike([1000.0, -1000.0, *WAVE], 7.0) is not None


@pytest.mark.parametrize("count", [0, FEWEST - 1, FEWEST])
def test_few_losses_tell_nothing(count: int) -> None:
    assert (find_spike(WAVE[:count], 1e9) is not None) is (count == FEWEST)


@pytest.mark.parametrize("slope", [-1.0, -1e-4, 1e-4, 1.0])
def test_a_straight_line_is_never_told(slope: float) -> None:
    """n losses that rise by d: the next is (n + 1) / 2 d above their mean, and sigma is d sqrt((n^2 - 1) / 12)."""
    line = [5 + slope * step for step in range(1000)]
    assert told(line) == []
    for count in (FEWEST, WINDOW):
        mean = math.fsum(line[:count]) / count
        sigma = math.sqrt(math.fsum((each - mean) ** 2 for each in line[:count]) / count)
        assert (line[count] - mean) / sigma == pytest.approx(
            math.copysign(math.sqrt(3 * (count + 1) / (count - 1)), slope)
        )


@pytest.mark.parametrize("height", [20.0, 1000.0, 1e9])
def test_a_level_that_rises_once_is_told_four_times(height: float) -> None:
    """With k of 128 losses at the new level, p = k / 128, it is sqrt((1 - p) / p) sigma above: above 6 for k <= 3."""
    assert told([*WAVE, *[height] * 500]) == [128, 129, 130, 131]


def test_a_curve_of_training_is_never_told() -> None:
    """ln 2, falling to 0.3, with a wave of 0.05 of its own."""
    assert told([0.3 + 0.393 * math.exp(-step / 200) + 0.05 * math.sin(step) for step in range(2000)]) == []


def test_equal_losses_have_a_sigma_of_rounding() -> None:
    """A part in 10^6 of the mean."""
    level = [0.6931471805599453] * WINDOW
    assert find_spike(level, 0.6931471805599453 * (1 + 5e-6)) is None
    assert find_spike(level, 0.6931471805599453 * (1 + 7e-6)) is not None


def test_the_losses_of_the_lines() -> None:
    lines = [{"step": 0, "eval/loss": 9.0}, {"step": 1, "train/loss": 1.0}, {"step": 2, "train/skipped": 1.0}]
    assert losses_of(lines) == [1.0]
    assert losses_of([{"step": step, "train/loss": float(step)} for step in range(200)]) == [
        *map(float, range(72, 200))
    ]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_tells_a_spike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool) -> None:
    """Of a window of four losses, and within half a sigma: a resumed run reads the losses before from its lines."""
    monkeypatch.setattr("dpo.train.spikes.WINDOW", 4)
    monkeypatch.setattr("dpo.train.spikes.FEWEST", 4)
    monkeypatch.setattr("dpo.train.spikes.SIGMAS", -1e9)  # every loss is told
    config = six_steps(save_six_steps(tmp_path), tmp_path / "run")
    if resumed:
        run_until(config, 5)
    folder = run(config)
    losses = [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]
    found = [line for line in logged(folder) if " sigma above the mean of the last 4, " in line]
    assert [line.split(":")[1] for line in found] == [" step 5", " step 6"]
    assert found[-1].removeprefix("WARNING: step 6: ") == str(find_spike(losses[:5], losses[5]))
