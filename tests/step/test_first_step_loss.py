"""The check of the first step compares what training minimizes with the loss of the measured log-ratios."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo.base.errors import RunError
from dpo.batch import packing
from dpo.config import LossConfig
from dpo.ref_logps.blocks import read_rows
from dpo.step import losses, objective
from dpo.step.deviation import Deviation
from dpo.train import start
from tests.step.test_first_step import LOSSES, cache, filled, folders, make, shift_rows
from tests.support.runs import exit_code, has_log_alone, run

__all__ = ["cache", "filled", "folders"]  # fixtures

pytestmark = pytest.mark.xdist_group("first-step-loss")  # one run has the answers to most tests


def shift_all(cache: Path) -> None:
    """Moves the cached rows by up to half of what is allowed in float32, each by another amount: no margin is 0, and no
    two are equal.
    """
    (folder,) = cache.iterdir()
    shift_rows(cache, np.linspace(-0.5, 0.5, len(read_rows(folder))) ** 3 * 4)


Losses = Callable[..., Tensor]


def exchanged(trees: Any) -> tuple[np.ndarray, np.ndarray]:
    """Winners for losers."""
    winners, losers = packing_pair_indices(trees)
    return losers, winners


def of_other_pairs(trees: Any) -> tuple[np.ndarray, np.ndarray]:
    """Each winner is compared with the loser of another pair."""
    winners, losers = packing_pair_indices(trees)
    return winners, np.roll(losers, 1)


def with_twice_beta(terms: losses.PairTerms, config: LossConfig) -> Tensor:
    return losses.preference_losses(terms, replace(config, beta=2 * config.beta))


def without_reference(pi_logps: Tensor, ref_logps: Tensor) -> Tensor:
    return losses.log_ratios(pi_logps, torch.zeros_like(ref_logps))


def of_the_probability(*args: Any) -> Tensor:
    """The mean of DPO's objective without its logarithm: 1/2, not ln 2, at h = 0."""
    return torch.exp(-losses.preference_losses(*args))


packing_pair_indices = packing.pair_indices

FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "winners and losers exchanged": (packing, "pair_indices", exchanged),
    "losers of other pairs": (packing, "pair_indices", of_other_pairs),
    "another beta": (objective, "preference_losses", with_twice_beta),
    "no reference": (objective, "log_ratios", without_reference),
    "another formula": (objective, "preference_losses", of_the_probability),
}


CHECKED = {**{name: loss for name, (loss, _) in LOSSES.items()}, "with the SFT term": LossConfig(sft_weight=0.5)}
FAULTY = ["dpo", "ipo, normalized", "hinge", "robust", "apo_zero", "apo_down, normalized", "dpop"]


@pytest.fixture(scope="module")
def answers(
    folders: Path, filled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[tuple[str | None, str], str]:
    """What the check says at the start of one run, by fault (None: without one) and loss; "" where it passes."""
    root, said = tmp_path_factory.mktemp("answers"), {}
    shutil.copytree(filled, root / "cache")
    shift_all(root / "cache")

    def ask_all(policy: Any, packer: Any, trees: Any, loss: LossConfig, terms: Any) -> Deviation:
        for name, other in CHECKED.items():
            said[None, name] = answer(policy, packer, trees, other, terms)
        for fault in FAULTS:
            with patch.object(*FAULTS[fault]):
                said.update({(fault, name): answer(policy, packer, trees, CHECKED[name], terms) for name in FAULTY})
        return verify_start(policy, packer, trees, loss, terms)

    with patch.object(start, "verify_start", ask_all):
        run(make(folders, root / "run", reference__cache_dir=str(root / "cache")))
    return said


def answer(*start: Any) -> str:
    """Why the check ends a run that starts so; "" where it does not."""
    try:
        verify_start(*start)
    except RunError as failure:
        return str(failure)
    return ""


verify_start = start.verify_start


@pytest.mark.parametrize("loss", CHECKED)
def test_no_false_alarm(answers: Mapping[tuple[str | None, str], str], loss: str) -> None:
    """Rows that differ as rounding lets them differ, whatever the loss."""
    assert answers[None, loss] == ""


@pytest.mark.parametrize("loss", FAULTY)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_loss_is_found(answers: Mapping[tuple[str | None, str], str], fault: str, loss: str) -> None:
    """Though every completion is within its bounds."""
    error = answers[fault, loss]
    assert "step 1: the preference loss is not that of an indifferent policy: a pair's loss is " in error
    assert error.endswith("; to train all the same: --reference.first_step_check warn")


def test_a_fault_of_the_loss_ends_the_run(
    folders: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and one line, before the first update."""
    shift_all(cache)
    monkeypatch.setattr(*FAULTS["losers of other pairs"])
    assert exit_code(make(folders, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "error: step 1: the preference loss is not that of an indifferent policy: a pair's loss is " in error
    assert error.rstrip().endswith("; to train all the same: --reference.first_step_check warn")
    assert has_log_alone(tmp_path / "run")
