"""A run as it is watched: every metric in its chart once, answers, margins and texts, also across an interruption."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dpo.board import sinks
from dpo.board.charts import has_chart
from dpo.config import Config, SourceConfig
from dpo.demo.world import preference_row, questions, save_model, save_rows
from dpo.run_folder.files import read_metrics
from tests.support.boards import board_of, points_of, steps_of
from tests.support.runs import (
    changed,
    error_lines,
    exit_code,
    make_config,
    run,
    run_until,
    same_weights,
    without_clock,
)


def example_rows() -> list[dict[str, Any]]:
    """Twelve questions of the demo, each with two answers."""
    rng = random.Random(0)
    return [preference_row(question, 2, rng) for question in questions(12, 0)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with its tokenizer, eight questions to learn from and four to evaluate."""
    root = tmp_path_factory.mktemp("watching")
    rows = example_rows()
    save_model(root / "model", rows, 0)
    save_rows(root / "pairs.jsonl", rows[:8])
    save_rows(root / "eval.jsonl", rows[8:])
    return root


def config(root: Path, name: str) -> Config:
    return make_config(
        root / "model",
        root / "pairs.jsonl",
        root / name,
        data__eval=[SourceConfig(str(root / "eval.jsonl"))],
        batch__pairs_per_step=4,
        train__steps=6,
        train__eval_every=3,
        optim__lr=1e-3,
        optim__warmup_steps=0,
        checkpoint__save_every=2,
        reference__cache_dir=str(root / "cache"),
        eval__samples=2,
        eval__max_new_tokens=5,
    )


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    return run(config(world, "whole"))


def test_every_figure_of_every_line_is_a_point(whole: Path) -> None:
    """But those that a run has once; and there is no other point."""
    expected: dict[str, list[object]] = {}
    for line in read_metrics(whole):
        for name in filter(has_chart, line.keys() - {"step"}):
            expected.setdefault(name, []).append((line["step"], pytest.approx(line[name], rel=1e-6)))
    assert points_of(whole / "tensorboard") == expected
    assert {name.partition("/")[0] for name in expected} == {"train", "eval"}


def test_answers_stand_beside_the_references(whole: Path) -> None:
    """Before training policy and reference are one; two prompts, after 0, 3 and 6 steps, in files and as texts."""
    files = sorted((whole / "answers").iterdir())
    assert [path.name for path in files] == [
        "reference.json",
        *(f"step-00000{step}.jsonl" for step in (0, 3, 6)),
    ]
    first = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert len(first) == 2 and all(row["reference"] == row["policy"] for row in first)
    assert steps_of(whole / "tensorboard", "run/answers") == [0, 3, 6]


def test_texts_and_histograms(whole: Path) -> None:
    """What ran on what, and how long it is; the margins of each evaluation."""
    board = whole / "tensorboard"
    texts = {tag.removeprefix("run/") for tag in board_of(board).Tags()["tensors"]}
    assert {"summary", "config", "data", "code", "answers"} <= texts
    assert steps_of(board, "values/eval/rewards/margins") == [0, 3, 6]
    for side in ("prompt", "chosen", "rejected"):
        assert steps_of(board, f"values/train/lengths/{side}") == [0]


def test_an_interruption_leaves_no_trace(world: Path, whole: Path) -> None:
    """Dies before step 6, after the checkpoint of step 4: step 5 is run twice, and stands once everywhere."""
    parts = config(world, "parts")
    run_until(parts, 6)
    run(parts)
    mine, theirs = (without_clock(read_metrics(folder))[1:] for folder in (whole, world / "parts"))
    assert mine == theirs and same_weights(whole / "final", world / "parts" / "final")
    steps = [{tag: [step for step, _ in line] for tag, line in points_of(folder / "tensorboard").items()}
             for folder in (whole, world / "parts")]  # fmt: skip
    assert steps[0] == steps[1]
    for path in (whole / "answers").iterdir():
        assert path.read_bytes() == (world / "parts" / "answers" / path.name).read_bytes()


def test_a_tracker_that_is_not_installed_ends_a_run_before_data_is_read(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of training pairs is missing too, which would be told later."""
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    changes = {"train__report_to": ["wandb"], "data__train": [SourceConfig("absent.jsonl")]}
    assert exit_code(changed(config(world, "untracked"), **changes)) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert "train.report_to: wandb is not installed; valid: after pip install '" in line
    assert not (world / "untracked").exists()


def test_sampling_changes_nothing(world: Path, whole: Path) -> None:
    """To the last bit, metrics and weights."""
    silent = run(changed(config(world, "silent"), eval__samples=0))
    assert not (silent / "answers").exists()
    mine, theirs = (without_clock(read_metrics(folder))[1:] for folder in (whole, silent))
    assert mine == theirs and same_weights(whole / "final", silent / "final")
