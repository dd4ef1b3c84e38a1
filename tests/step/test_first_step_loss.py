"""The check of the first step compares what training minimizes with the loss of the measured log-ratios."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo.batch import packing
from dpo.config import LossConfig
from dpo.ref_logps.blocks import read_rows
from dpo.step import losses, objective
from tests.step.test_first_step import LOSSES, folders, make, shift_rows
from tests.support.runs import exit_code, run, train_lines

__all__ = ["folders"]  # a fixture


@pytest.fixture
def cache(folders: Path, tmp_path: Path) -> Path:
    """A reference cache whose rows are off by up to half of what is allowed in float32, each by another amount: no
    margin is 0, and no two are equal.
    """
    run(make(folders, tmp_path / "first"))
    (folder,) = (tmp_path / "reference-cache").iterdir()
    shift_rows(tmp_path / "reference-cache", np.linspace(-0.5, 0.5, len(read_rows(folder))) ** 3 * 4)
    return tmp_path / "reference-cache"


def keys_of(loss: LossConfig) -> dict[str, object]:
    return {f"loss__{key}": value for key, value in vars(loss).items()}


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LOSSES, "with the SFT term"])
def test_no_false_alarm(folders: Path, tmp_path: Path, cache: Path, name: str) -> None:
    """Rows that differ as rounding lets them differ, whatever the loss."""
    loss, expected = LOSSES.get(name, (LossConfig(sft_weight=0.5), None))
    (line,) = train_lines(run(make(folders, tmp_path / "run", **keys_of(loss))))
    assert expected is None or line["train/loss"] == pytest.approx(expected, rel=1e-3)


Losses = Callable[..., Tensor]


def exchanged(trees: Any) -> tuple[np.ndarray, np.ndarray]:
    """Winners for losers."""
    winners, losers = packing_pair_indices(trees)
    return losers, winners


def of_other_pairs(trees: Any) -> tuple[np.ndarray, np.ndarray]:
    """Each winner is compared with the loser of another pair."""
    winners, losers = packing_pair_indices(trees)
    return winners, np.roll(losers, 1)


def with_twice_beta(*args: Any) -> Tensor:
    *tensors, config = args
    return losses.preference_losses(*tensors, replace(config, beta=2 * config.beta))


def without_reference(pi_logps: Tensor, ref_logps: Tensor, *others: Any) -> Tensor:
    return losses.preference_losses(pi_logps, torch.zeros_like(ref_logps), *others)


def of_the_probability(*args: Any) -> Tensor:
    """The mean of DPO's objective without its logarithm: 1/2, not ln 2, at h = 0."""
    return torch.exp(-losses.preference_losses(*args))


packing_pair_indices = packing.pair_indices

FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "winners and losers exchanged": (packing, "pair_indices", exchanged),
    "losers of other pairs": (packing, "pair_indices", of_other_pairs),
    "another beta": (objective, "preference_losses", with_twice_beta),
    "no reference": (objective, "preference_losses", without_reference),
    "another formula": (objective, "preference_losses", of_the_probability),
}


@pytest.mark.parametrize("loss", ["dpo", "ipo, normalized", "hinge", "robust"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_loss_ends_the_run(
    folders: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    loss: str,
) -> None:
    """Though every completion is within its bounds."""
    monkeypatch.setattr(*FAULTS[fault])
    assert exit_code(make(folders, tmp_path / "run", **keys_of(LOSSES[loss][0]))) == 1
    error = capsys.readouterr().err
    assert "error: step 1: the preference loss is not that of an indifferent policy: a pair's loss is " in error
    assert error.rstrip().endswith("; to train all the same: --reference.first_step_check warn")
