"""Reference rows that were made otherwise, by another torch or on another GPU: what the first step's check excuses."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.config import Config
from dpo.ref_logps.blocks import circumstances_of, read_rows, write_circumstances, write_rows
from dpo.run_folder.files import read_metrics
from tests.support.runs import exit_code, has_log_alone, run, save_six_steps, six_steps, train_lines

BFLOAT16 = {"parallel__compute_dtype": "bfloat16"}
WITHIN, BEYOND = 0.1, 2.0
"""Nats by which each row is moved. Completions have 2 to 16 tokens: the spread is between 0.1 / 4 and 0.1 / sqrt(2),
0.025 and 0.071, below the cap of 0.25; or at least 2 / 4.
"""


@pytest.fixture(scope="module")
def bfloat16_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in bfloat16 whose cache has all rows."""
    root = save_six_steps(tmp_path_factory.mktemp("circumstances"))
    run(first_step(root, root / "first", **BFLOAT16))
    (line,) = [line for line in read_metrics(root / "first") if "first_step/noise" in line]
    assert 6 * line["first_step/noise"] < 0.025, "few completions may be 6 noises off"
    return root


@pytest.fixture
def filled(bfloat16_run: Path, tmp_path: Path) -> Path:
    """A test's own copy of `bfloat16_run`."""
    return Path(shutil.copytree(bfloat16_run, tmp_path / "filled"))


def first_step(root: Path, run_dir: Path, **changes: Any) -> Config:
    """The first of the six steps, with no evaluation."""
    return six_steps(root, run_dir, train__steps=1, data__eval=[], train__eval_every=None, **changes)


def move_rows(cache: Path, nats: float, **made: Any) -> None:
    """Moves all rows, in a block that was made as they were but for what `made` says."""
    (folder,) = cache.iterdir()
    rows = read_rows(folder)
    keys = np.stack([rows.high, rows.low], 1)
    (circumstances,) = circumstances_of(folder, keys)
    assert circumstances is not None
    for old in (*folder.glob("rows-*"), *folder.glob("made-*")):
        old.unlink()
    write_circumstances(write_rows(folder, keys, rows.logps + nats), {**circumstances, **made})


@pytest.mark.parametrize(
    "made", [{"torch": "2.11.0"}, {"device": "sm_90"}, {"compile": True}], ids=lambda made: next(iter(made))
)
def test_rows_computed_differently_are_beyond_their_noise_with_a_warning(
    filled: Path, made: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on to its end; the warning says what differs and how far the rows are off."""
    move_rows(filled / "cache", WITHIN, **made)
    assert exit_code(first_step(filled, filled / "second", **BFLOAT16)) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING: step 1:")]
    ((name, value),) = made.items()
    assert warning.startswith("WARNING: step 1: the policy is not its own reference: pi_logp -")
    difference = warning.partition("the cached rows of the reference were computed differently: ")[2]
    before, now = difference.split("; this run: ")
    assert f"{name} {value}" in before
    assert f"{name} {value}" not in now
    assert len(train_lines(filled / "second")) == 1
    (line,) = [line for line in read_metrics(filled / "second") if "first_step/spread" in line]
    assert 0.02 < line["first_step/spread"] < 0.08
    assert 0.005 < line["first_step/drift"] < 0.02


def test_rows_made_alike_are_not_excused(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rows, with the record that the run itself would write: something found while running, exit code 1."""
    move_rows(filled / "cache", WITHIN)
    assert exit_code(first_step(filled, filled / "second", **BFLOAT16)) == 1
    error = capsys.readouterr().err
    assert "error: step 1: the policy is not its own reference: pi_logp -" in error
    assert "computed differently" not in error
    assert has_log_alone(filled / "second")


def test_beyond_the_caps_nothing_is_excused(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    move_rows(filled / "cache", BEYOND, torch="2.11.0")
    assert exit_code(first_step(filled, filled / "second", **BFLOAT16)) == 1
    error = capsys.readouterr().err
    assert "error: step 1: the policy is not its own reference: pi_logp -" in error
    assert "computed differently: torch 2.11.0" in error


def test_exact_float32_excuses_nothing(tmp_path: Path) -> None:
    """It has no noise to be beyond of: each row is held to 1e-4 + 1e-5 |ref|, whoever made it."""
    save_six_steps(tmp_path)
    run(first_step(tmp_path, tmp_path / "first"))
    move_rows(tmp_path / "cache", WITHIN, torch="2.11.0")
    assert exit_code(first_step(tmp_path, tmp_path / "second")) == 1
