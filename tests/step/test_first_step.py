"""The check before the first update: the policy is its own reference, whatever the loss, or the run ends."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dpo.batch.packer import Packer
from dpo.batch.plan import StepPlan
from dpo.config import Config, LossConfig
from dpo.ref_logps import cache as ref_cache
from dpo.ref_logps.blocks import ROW, circumstances_of, read_rows, write_circumstances, write_rows
from dpo.ref_logps.circumstances import difference, joined_circumstances
from dpo.ref_logps.table import table_circumstances, write_table
from dpo.run_folder.files import read_metrics
from dpo.step import first_step
from dpo.step.deviation import Completions, Verdict, caps, exact_bounds, judge, limits, measure, rounding_scale
from dpo.step.first_step import Terms
from dpo.train.start import first_step_terms
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import exit_code, has_log_alone, make_config, run, train_lines

NUM_PAIRS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and pairs.jsonl."""
    root = tmp_path_factory.mktemp("first-step")
    save_model(root / "model", "llama")
    save_pairs(root / "pairs.jsonl", NUM_PAIRS)
    return root


@pytest.fixture(scope="module")
def filled(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference cache of a run: all rows in float32."""
    root = tmp_path_factory.mktemp("filled")
    run(make(folders, root / "run", reference__cache_dir=str(root / "cache")))
    return root / "cache"


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    """A test's own copy of `filled`, where runs look for it."""
    return Path(shutil.copytree(filled, tmp_path / "reference-cache"))


def make(folders: Path, run_dir: Path, **changes: object) -> Config:
    """One step on all four pairs, no update worth the name."""
    changes = {"batch__pairs_per_step": NUM_PAIRS, "train__steps": 1} | changes
    return make_config(folders / "model", folders / "pairs.jsonl", run_dir, **changes)


def shift_rows(cache: Path, shift: float | np.ndarray, only: int | None = None) -> None:
    """Moves the cached log-probabilities (or one of them) by so many allowed differences in float32, one number for
    all rows or one a row.
    """
    (folder,) = cache.iterdir()
    rows = read_rows(folder)
    allowed = 1e-4 + 1e-5 * np.abs(rows.logps)
    chosen = np.arange(len(rows)) == only if only is not None else np.ones(len(rows), bool)
    for block in folder.glob("rows-*"):
        block.unlink()
    write_rows(folder, np.stack([rows.high, rows.low], 1), rows.logps + shift * allowed * chosen)


# --- what it lets pass -----------------------------------------------------------------------------------------------

LOSSES = {
    "dpo": (LossConfig(), math.log(2)),
    "smoothed": (LossConfig(label_smoothing=0.2), math.log(2)),
    "steep": (LossConfig(beta=5.0), math.log(2)),
    "normalized": (LossConfig(length_normalized=True), math.log(2)),
    "ipo": (LossConfig(name="ipo"), 25.0),
    "ipo, small beta": (LossConfig(name="ipo", beta=0.01), 2500.0),
    "ipo, normalized": (LossConfig(name="ipo", length_normalized=True), 25.0),
    "hinge": (LossConfig(name="hinge"), 1.0),
    "robust": (LossConfig(name="robust", label_smoothing=0.4), math.log(2)),
    "apo_zero": (LossConfig(name="apo_zero"), 1.0),
    "apo_down, normalized": (LossConfig(name="apo_down", length_normalized=True), 1.0),
    "dpop": (LossConfig(name="dpop"), math.log(2)),
}
"""Log-ratios 0: dpo, robust and dpop give ln 2 for every eps, ipo 1/(4 beta^2), hinge and apo 1."""


def test_the_second_packing_has_half_of_the_tokens_and_other_places(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trees in reverse order, in rows of half the tokens. All four pairs fit one row."""
    compute, seen = first_step._run, []

    def spy(policy: Any, packer: Packer, plan: StepPlan, *rest: Any) -> Any:
        prompts = [tree.prompt_ids.tolist() for micro in plan.micro_batches[0] for tree in micro]
        seen.append((packer.tokens_per_micro_batch, prompts))
        return compute(policy, packer, plan, *rest)

    monkeypatch.setattr(first_step, "_run", spy)
    run(make(folders, tmp_path, batch__tokens_per_micro_batch=4096))
    (whole, prompts), (half, moved) = seen
    assert (whole, half) == (4096, 2048)
    assert len(prompts) > 1 and moved == prompts[::-1]


@pytest.mark.parametrize("name", ["ipo, small beta", "ipo, normalized", "hinge", "robust"])
def test_the_first_loss_is_that_of_an_indifferent_policy(folders: Path, tmp_path: Path, cache: Path, name: str) -> None:
    """No false alarm, and train/loss within 1e-5 (relative, for the large ones of ipo)."""
    loss, expected = LOSSES[name]
    config = make(folders, tmp_path / "run", **{f"loss__{key}": value for key, value in vars(loss).items()})
    assert train_lines(run(config))[0]["train/loss"] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_sft_term_comes_on_top(folders: Path, tmp_path: Path, cache: Path) -> None:
    line = train_lines(run(make(folders, tmp_path / "run", loss__sft_weight=0.5)))[0]
    assert line["train/loss"] == pytest.approx(math.log(2) + 0.5 * line["train/loss_sft"], rel=1e-6)
    assert line["train/loss_sft"] > 1


def test_no_false_alarm_in_another_layout(folders: Path, tmp_path: Path, cache: Path) -> None:
    """Rows computed in one packing, all trees in one row, are checked in another, each tree in a row of its own."""
    changes = {"batch__tokens_per_micro_batch": 1, "batch__group_by_prompt": True, "train__seed": 3}
    lines = train_lines(run(make(folders, tmp_path / "run", **changes)))
    assert lines[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_exact_bounds() -> None:
    """1e-4 + 1e-5 |ref|: 100 nats may be off by 1.1e-3."""
    assert exact_bounds(np.array([-100.0, -10.0])).tolist() == pytest.approx([1.1e-3, 2e-4], rel=1e-12)


@pytest.mark.parametrize(
    ("compute", "tf32", "scale"),
    [
        (torch.float32, False, None),
        (torch.float64, False, None),
        (torch.float64, True, None),
        (torch.float32, True, 1 / 8),
        (torch.bfloat16, False, 1.0),
    ],
)
def test_what_is_held_to_exact_bounds(compute: torch.dtype, tf32: bool, scale: float | None) -> None:
    """TF32 rounds: it is not held to the bounds of exact float32."""
    assert rounding_scale(compute, tf32) == scale


@pytest.mark.parametrize(
    ("device", "tf32", "scale"), [("cuda", True, 1 / 8), ("cuda", False, None), ("cpu", True, None)]
)
def test_tf32_is_of_cuda_alone(device: str, tf32: bool, scale: float | None) -> None:
    """A run on a CPU computes in exact float32, whatever the key says, and is held to it."""
    run: Any = SimpleNamespace(
        config=make_config("model", "pairs", "run", parallel__tf32=tf32, parallel__compute_dtype="float32"),
        world=SimpleNamespace(device=torch.device(device)),
        compute_dtype=torch.float32,
        reference_pass=None,
    )
    assert first_step_terms(run) == Terms(scale, "stop", None)


@pytest.mark.parametrize(
    ("noise", "num", "scale", "spread", "drift"),
    [
        (0.04, 64, 1.0, 0.12, 0.24 / 80),  # 3 noise; 6 noise / sqrt(64 x 100 tokens)
        (0.04, 31, 1.0, 0.24, 0.24 / math.sqrt(3100)),  # few: 6 noise
        (0.04, 32, 1.0, 0.12, 0.24 / math.sqrt(3200)),
        (0.0, 64, 1.0, 0.01, 0.002),  # the floors
        (9.0, 64, 1.0, 0.25, 0.02),  # the caps
        (0.0, 64, 1 / 8, 0.00125, 0.00025),
        (9.0, 64, 1 / 8, 0.03125, 0.0025),
        (0.005, 64, 1 / 8, 0.015, 0.03 / 80),
    ],
)
def test_limits(noise: float, num: int, scale: float, spread: float, drift: float) -> None:
    """min(0.25, max(3 noise, 0.01)) and min(0.02, max(6 noise / sqrt(tokens), 0.002)), by hand."""
    found = limits(noise, np.full(num, 100), scale)
    assert (found.spread, found.drift) == pytest.approx((spread, drift), rel=1e-12)
    assert found.spread <= caps(scale).spread
    assert found.drift <= caps(scale).drift


# --- what it stops ---------------------------------------------------------------------------------------------------


def test_a_row_a_little_beyond_the_tolerance_ends_the_run(
    folders: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0.7 of what is allowed passes, 1.3 does not (the recomputation itself may be off by 0.3): exit code 1."""
    shift_rows(cache, 0.7, only=2)
    run(make(folders, tmp_path / "first"))
    shift_rows(cache, 0.6, only=2)
    assert exit_code(make(folders, tmp_path / "second")) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert error.startswith("error: step 1: the policy is not its own reference: pi_logp -")
    assert has_log_alone(tmp_path / "second")


def test_the_worst_row_is_the_one_named(
    folders: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows are off, one of them ten times as far: the line has its log-probabilities, length and first ids."""
    right = read_rows(next(cache.iterdir())).logps[5]
    shift_rows(cache, 2.0)
    shift_rows(cache, 18.0, only=5)
    wrong = read_rows(next(cache.iterdir())).logps[5]
    assert exit_code(make(folders, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert f"pi_logp {right:.6g}, ref_logp {wrong:.6g} nats for the completion of " in error


@pytest.mark.parametrize("loss", ["ipo", "hinge", "robust"])
def test_other_losses_are_checked_too(folders: Path, tmp_path: Path, cache: Path, loss: str) -> None:
    shift_rows(cache, 5.0, only=0)
    assert exit_code(make(folders, tmp_path / "run", loss__name=loss)) == 1


def test_a_value_that_is_no_number_ends_the_run(
    folders: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block that is whole, and holds nonsense; no key lets it pass, and none is named."""
    (folder,) = cache.iterdir()
    (block,) = folder.glob("rows-*")
    table = np.frombuffer(block.read_bytes(), ROW).copy()
    block.unlink()
    table["logp"][3] = math.inf
    write_rows(folder, np.stack([table["high"], table["low"]], 1), table["logp"])
    for check in ("stop", "warn"):
        assert exit_code(make(folders, tmp_path / "run", reference__first_step_check=check)) == 1
    error = capsys.readouterr().err
    assert error.count("error: step 1: the policy is not its own reference") == 2
    assert "first_step_check" not in error


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["pi_logps", "repacked_logps", "ref_logps"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_value_that_is_no_number_is_no_deviation(value: float, name: str, scale: float | None) -> None:
    """In any of the three, with exact bounds and with those of bfloat16."""
    logps = np.full(4, -10.0)
    found = Completions(logps, logps, logps, np.full(4, 5), [[1]] * 4)
    assert judge(found, scale) == Verdict.PASSES
    assert judge(replace(found, **{name: np.array([-10.0, -10.0, value, -10.0])}), scale) == Verdict.NOT_FINITE


def test_a_resumed_policy_is_not_its_reference_and_is_not_checked(folders: Path, tmp_path: Path, cache: Path) -> None:
    """At learning rate 0.01 the policy is far away after a step; going on from there is no fault."""
    changes = {"optim__lr": 1e-2, "optim__warmup_steps": 0, "optim__max_grad_norm": None}
    run(make(folders, tmp_path / "run", **changes))
    run(make(folders, tmp_path / "run", **changes | {"train__steps": 2}))
    assert abs(train_lines(tmp_path / "run")[1]["train/loss"] - math.log(2)) > 1e-3


# --- what bfloat16 lets pass, and the way past the check -------------------------------------------------------------

BFLOAT16 = {"parallel__compute_dtype": "bfloat16"}


def move_rows(cache: Path, nats: float) -> None:
    """Moves all cached log-probabilities; how they were made is then not known."""
    (folder,) = cache.iterdir()
    rows = read_rows(folder)
    for block in (*folder.glob("rows-*"), *folder.glob("made-*")):
        block.unlink()
    write_rows(folder, np.stack([rows.high, rows.low], 1), rows.logps + nats)


def test_beyond_the_caps_a_run_stops_and_warn_goes_on(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows off by 10 nats, completions of at most 16 tokens: the spread is at least 10 / 4."""
    run(make(folders, tmp_path / "first", **BFLOAT16))
    move_rows(tmp_path / "reference-cache", 10.0)
    assert exit_code(make(folders, tmp_path / "second", **BFLOAT16)) == 1
    error = capsys.readouterr().err
    assert error.rstrip().endswith("; to train all the same: --reference.first_step_check warn")
    assert all(name in error for name in ("spread", "drift", "noise"))
    assert has_log_alone(tmp_path / "second")
    config = make(folders, tmp_path / "third", reference__first_step_check="warn", **BFLOAT16)
    assert exit_code(config) == 0
    warning = capsys.readouterr().err
    assert "WARNING: step 1: the policy is not its own reference" in warning
    assert "to train all the same" not in warning
    (line,) = [line for line in read_metrics(tmp_path / "third") if "first_step/spread" in line]
    assert line["step"] == 0
    assert line["first_step/spread"] > 2.5


def test_noise_is_between_the_packings_spread_and_drift_are_to_the_reference() -> None:
    """Over 4 and 16 tokens: packings 0.2 and 0.4 nats apart, so 0.1 each; the reference 1 and 3, so 1/2 and 3/4."""
    pi_logps = np.array([-10.0, -20.0])
    repacked_logps, ref_logps = pi_logps - [0.2, 0.4], pi_logps - [1, 3]
    deviation = measure(Completions(pi_logps, repacked_logps, ref_logps, np.array([4, 16]), [[1]] * 2))
    assert deviation.noise == pytest.approx(0.1)
    assert deviation.spread == pytest.approx(math.sqrt((0.25 + 0.5625) / 2))
    assert deviation.drift == pytest.approx(4 / 20)


def test_rows_computed_differently_are_held_to_the_caps_alone() -> None:
    """Spread 0.1 with noise 0: beyond the floor 0.01, within the cap 0.25."""
    pi, lengths = np.full(64, -50.0), np.full(64, 25)
    signs = np.where(np.arange(64) % 2, 1.0, -1.0)
    found = Completions(pi, pi, pi + 0.5 * signs, lengths, [[1]] * 64)
    assert measure(found).spread == pytest.approx(0.1)
    assert judge(found, 1.0) == Verdict.BEYOND_NOISE
    assert judge(replace(found, ref_logps=pi + 1.3 * signs), 1.0) == Verdict.BEYOND_BOUNDS  # 0.26
    assert judge(replace(found, ref_logps=pi + 0.04 * signs), 1.0) == Verdict.PASSES  # 0.008
    assert judge(replace(found, ref_logps=pi + 0.04 * signs), None) == Verdict.BEYOND_BOUNDS


def test_how_blocks_were_made_survives_the_table(tmp_path: Path) -> None:
    """Two blocks made alike, then one made otherwise: only who needs its rows is told."""
    keys = np.arange(12, dtype=np.uint64).reshape(-1, 2)
    here, there = ({"torch": version, "device": "cpu", "compile": False} for version in ("2.13", "2.11"))
    write_circumstances(write_rows(tmp_path, keys[:3], np.arange(3.0)), here)
    write_circumstances(write_rows(tmp_path, keys[3:], np.arange(3.0)), there)
    assert circumstances_of(tmp_path, keys[:3]) == [here]
    write_table(tmp_path, "table-a.json", keys)
    made = table_circumstances(tmp_path, "table-a.json")
    assert made == [there, here]
    assert difference(made, here) == (
        "torch 2.11, device cpu, compile False; this run: torch 2.13, device cpu, compile False"
    )
    assert difference([here], here) is None
    assert difference([None], here) is not None


def test_rows_of_unlike_ranks_are_made_by_all_of_them() -> None:
    """Two kinds of GPU, once each, whatever the order of the ranks; what is alike stands as one rank says it."""
    ranks = [{"torch": "2.13", "device": device, "compile": True} for device in ("sm_90", "sm_80", "sm_90")]
    assert joined_circumstances(ranks) == {"torch": "2.13", "device": "sm_80, sm_90", "compile": True}
    assert joined_circumstances(ranks[:1]) == ranks[0]
    assert difference([joined_circumstances(ranks)], joined_circumstances(ranks[::-1])) is None
    assert difference([ranks[0]], joined_circumstances(ranks)) is not None


def fill_as(config: Config, torch_version: str) -> None:
    """A run on a rank that says it has another torch than rank 0."""
    rank = int(os.environ["RANK"])
    real = ref_cache.circumstances_here
    with patch.object(
        ref_cache, "circumstances_here", lambda *args: real(*args) | {"torch": f"{torch_version}.{rank}"}
    ):
        run(config)


@pytest.mark.xdist_group("ranks")
def test_a_block_says_how_every_rank_made_its_rows(folders: Path, tmp_path: Path, ranks: Ranks) -> None:
    ranks(2, fill_as, make(folders, tmp_path / "run"), "2")
    (folder,) = (tmp_path / "reference-cache").iterdir()
    (made,) = folder.glob("made-*")
    assert json.loads(made.read_text()) == {"torch": "2.0, 2.1", "device": "cpu", "compile": False}


@pytest.mark.xdist_group("ranks")
def test_two_ranks_measure_what_one_does(folders: Path, tmp_path: Path, cache: Path, ranks: Ranks) -> None:
    """The sums are over all completions of all ranks, in micro-batches of any size."""
    move_rows(cache, 1.0)
    changes = {"reference__first_step_check": "warn"}
    one = run(make(folders, tmp_path / "one", **changes))
    two = ranks(2, run, make(folders, tmp_path / "two", batch__tokens_per_micro_batch=40, **changes))[0]
    lines = [next(line for line in read_metrics(folder) if "first_step/spread" in line) for folder in (one, two)]
    for name in ("spread", "drift"):
        assert lines[1][f"first_step/{name}"] == pytest.approx(lines[0][f"first_step/{name}"], rel=1e-4)
    assert max(line["first_step/noise"] for line in lines) < 1e-4
