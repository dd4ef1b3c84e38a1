"""What the terminal shows: lines that fit, numbers worked out by hand."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dpo.adapters.nf4_linear import NF4Linear
from dpo.config import Config, OptimConfig, SourceConfig
from dpo.disk.sizes import num_parameters
from dpo.train.summary import COLUMNS, evaluation_line, fitting, remaining, state_bytes, step_line, tell_warmup
from tests.support.runs import changed, exit_code, make_config, run, save_six_steps, six_steps, train_lines

FIGURES = {
    "train/loss": 0.65124,
    "train/rewards/accuracies": 0.640625,
    "train/rewards/margins": 0.1317,
    "train/pairs_per_second": 412.3,
    "train/grad_norm": 3.412,
    "train/lr": 7.947e-07,
}


def test_a_step_in_one_line() -> None:
    shown = "step  120/2514  loss 0.6512  acc 0.641  margin 0.132  lr 7.9e-7  grad 3.4  eta 12m33s  412 pairs/s"
    assert step_line(120, 2514, FIGURES, 753.4) == shown
    assert "  1094 pairs/s" in step_line(120, 2514, FIGURES | {"train/pairs_per_second": 1093.7}, 753.4)
    assert "  8.78 pairs/s" in step_line(120, 2514, FIGURES | {"train/pairs_per_second": 8.777}, 753.4)
    assert "  grad 341  " in step_line(120, 2514, FIGURES | {"train/grad_norm": 341.2}, 753.4)


@pytest.mark.parametrize("last_step", [999, 1_000, 9_999, 99_999])
def test_nothing_falls_off_a_long_run(last_step: int) -> None:
    """Days of steps, with a margin below 0 and a gradient norm of two digits."""
    figures = FIGURES | {"train/rewards/margins": -1.132, "train/grad_norm": 12.7, "train/pairs_per_second": 41.2}
    line = step_line(last_step, last_step, figures, 176_400)
    assert len(line) <= COLUMNS and line.endswith("  lr 7.9e-7  grad 13  eta 2d01h  41.2 pairs/s")


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e3, 1e9, -1e9])
def test_every_line_fits_100_columns(scale: float) -> None:
    """The step stays, whatever the metrics are."""
    metrics = {name: scale * metric for name, metric in FIGURES.items()}
    line = step_line(1_000_000, 1_000_000, metrics, 1e7)
    assert len(line) <= COLUMNS and line.startswith("step 1000000/1000000  loss ")
    evaluation = {name.replace("train", "eval"): metric for name, metric in metrics.items()} | {"eval/pairs": 10**9}
    assert len(evaluation_line(10**6, 10**6, evaluation)) <= COLUMNS


def test_a_loss_without_a_reference_has_no_margin() -> None:
    metrics = {name: metric for name, metric in FIGURES.items() if "rewards" not in name}
    assert "margin" not in step_line(1, 2, metrics, 0) and "loss 0.6512" in step_line(1, 2, metrics, 0)


def test_the_last_parts_go_first() -> None:
    """Two spaces between parts: 40 + 2 + 58 = 100 columns fit, one more does not."""
    assert fitting(["a" * 40, "b" * 58, "c"]) == "a" * 40 + "  " + "b" * 58
    assert fitting(["a" * 40, "b" * 59, "c"]) == "a" * 40


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (45.2, "45s"),
        (59.6, "1m00s"),
        (753, "12m33s"),
        (3725, "1h02m"),
        (176_400, "2d01h"),
    ],
)
def test_the_time_that_is_left(seconds: float, text: str) -> None:
    """In two units, rounded to the smaller one, also up to the next larger unit."""
    assert remaining(seconds) == text


def test_before_training_no_accuracy_looks_like_a_failure() -> None:
    """Margins of 0 are no preference, which counts as wrong: 0.000 says nothing of the model."""
    metrics = {"eval/loss": 0.69314, "eval/rewards/accuracies": 0.0, "eval/rewards/margins": 0.0, "eval/pairs": 600}
    shown = "eval   0/150  loss 0.6931  the policy is the reference: all margins 0  600 pairs"
    assert evaluation_line(0, 150, metrics, is_reference=True) == shown
    assert "acc 0.000  margin 0.000" in evaluation_line(50, 150, metrics)
    assert step_line(1, 150, FIGURES, 9, True).startswith("step   1/150  loss 0.6512  all margins 0  lr 7.9e-7  ")


@pytest.mark.parametrize(
    ("optim", "numbers"),
    [
        (OptimConfig(), 3),
        (OptimConfig(momentum=0.9), 4),
        (OptimConfig(name="adamw"), 4),
        (OptimConfig(name="sgd"), 2),
        (OptimConfig(name="sgd", momentum=0.9), 3),
    ],
)
def test_state_bytes(optim: OptimConfig, numbers: int) -> None:
    """A weight, its gradient, and the optimizer's numbers, 4 bytes each: 1000 weights in 2 copies over 8 ranks are
    1000 * numbers * 4 / 4 bytes a rank."""
    config = dataclasses.replace(make_config("m", "t", "r", parallel__replicate=2), optim=optim)
    assert state_bytes(nn.Linear(10, 100, bias=False), config, 8) == 1000 * numbers


def test_a_quantized_weight_counts_its_parameters_and_its_bytes() -> None:
    """Of 10 rows of 128 frozen weights, two blocks of 36 bytes each, and a bias of 10 in bfloat16."""
    layer = NF4Linear(nn.Linear(128, 10, dtype=torch.bfloat16), torch.bfloat16, False).requires_grad_(False)
    model = nn.Sequential(layer, nn.Linear(10, 3, bias=False))
    assert num_parameters(model) == 10 * 128 + 10 + 30
    config = dataclasses.replace(make_config("m", "t", "r"), optim=OptimConfig(name="adamw"))
    assert state_bytes(model, config, 1) == 10 * 72 + 2 * 10 + 4 * 4 * 30


@pytest.mark.parametrize(
    ("warmup", "last_step", "told"),
    [
        (150, 12, "150 is not below the run's 12 steps: the learning rate ends at 7.9e-08, not 1e-06"),
        (150, 150, "150 is not below the run's 150 steps: the learning rate ends at 9.9e-07, not 1e-06"),
        (150, 151, "150 is more than a tenth of the run's 151 steps"),
        (150, 1499, "150 is more than a tenth of the run's 1499 steps"),
        (150, 1500, None),
        (0, 1, None),
        (0.5, 12, None),
    ],
)
def test_a_long_warm_up_is_told(
    warmup: float, last_step: int, told: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line that says what to write. At step 12 of 12 the rate is 1e-6 * 12/151, at 150 1e-6 * 150/151."""
    tell_warmup(last_step, OptimConfig(warmup_steps=warmup))
    lines = capsys.readouterr().err.splitlines()
    if told is None:
        assert lines == []
    else:
        assert len(lines) == 1 and f"optim.warmup_steps {told}; " in lines[0]
        assert lines[0].endswith("; for a tenth of the run: --optim.warmup_steps 0.1")
        assert lines[0].startswith("WARNING: ") == (last_step <= warmup)


# --- of real runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("summary")
    save_six_steps(root)
    return root


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Config:
    return six_steps(root, tmp_path / "run")


def test_a_run_tells_what_it_is(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """21,728 weights (counted by Hugging Face), 3 numbers of 4 bytes each: 260,736 bytes; 8 and 2 pairs of 2
    completions, in 6 steps of 4."""
    run(changed(config, train__log_every=4))
    lines = capsys.readouterr().err.splitlines()
    table = dict(line.split(maxsplit=1) for line in lines if not line.startswith(("step", "eval", "  ")))
    assert "21,728 parameters in float32, computes in float32" in table["model"]
    assert table["memory"].startswith("254.6 KiB per rank")
    assert table["reference"] == "the model before training"
    told = [line for line in lines if "log-probabilities" in line]
    assert len(told) == 1 and told[0].startswith("reference: 20 log-probabilities computed, 0 from the cache ")
    assert table["charts"] == f"tensorboard --logdir {config.train.run_dir}"
    assert [line[:8] for line in lines if "the policy is the reference: all margins 0" in line] == ["eval 0/6"]
    assert [line[:8] for line in lines if "  all margins 0  " in line] == ["step 1/6"]
    assert any(re.match(r"steps +6, each of 4 pairs in about ", line) for line in lines)
    shown = [line.split()[1] for line in lines if line.startswith(("step ", "eval "))]
    assert shown == ["0/6", "1/6", "3/6", "4/6", "6/6", "6/6"]
    assert any(line.startswith("held out  step 0 -> step 6: loss 0.6931 -> ") for line in lines)


def test_a_fraction_of_the_run_is_its_warm_up(config: Config) -> None:
    """A third of 6 steps: lr/3, 2 lr/3, then lr (1/2 + f/2) with f = 4/5, 3/5, 2/5, 1/5."""
    changes = {"optim__warmup_steps": 0.33, "optim__schedule": "linear", "optim__min_lr_ratio": 0.5}
    run(changed(config, optim__lr=1e-3, **changes))
    rates = [line["train/lr"] for line in train_lines(str(config.train.run_dir))]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 0.9e-3, 0.8e-3, 0.7e-3, 0.6e-3])


def test_the_data_report_comes_before_too_few_pairs(
    root: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of eight pairs four are held out, and the same four of the second source removed: eight are left of sixteen."""
    path = str(root / "pairs.jsonl")
    sources = [SourceConfig(path, holdout=0.5), SourceConfig(path)]
    few = changed(config, data__train=sources, data__eval=[], batch__pairs_per_step=9)
    assert exit_code(few) == 2
    lines = capsys.readouterr().err.splitlines()
    removed = lines.index("  4 pairs removed from training: their prompt is held out")
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert removed < lines.index(error)
    reasons = "not trained on: 4 held out for evaluation, 4 removed because their prompt is held out"
    assert f"8 pairs to train on, fewer than batch.pairs_per_step 9; {reasons}" in error


def test_quiet_is_quiet(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing at all of a good run, every metric in metrics.jsonl; what is wrong is still said."""
    assert exit_code(config, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert len(train_lines(str(config.train.run_dir))) == 6
    assert exit_code(config, "--quiet", "--optim.lr", "0") == 2
    assert capsys.readouterr().err.startswith("error: command line: optim.lr: ")
