"""Runs side by side, from run folders with metrics given by hand."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo.board.hparams import ENTRY
from dpo.command.exits import run_program
from dpo.config import SourceConfig, to_yaml
from dpo.config.effects import CHANGING
from launch import compare
from tests.support.boards import hparams_entry
from tests.support.runs import make_config

Figures = Sequence[dict[str, float]]


def save_run(folder: Path, lines: Figures, done: bool = False, **changes: Any) -> Path:
    """A run folder with the metrics of `lines`; `changes` are keys like `loss__beta=0.5`."""
    (folder / "tensorboard").mkdir(parents=True)
    config = make_config("model", "train.jsonl", folder, **({"train__steps": 30} | changes))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (folder / "final").mkdir()
    return folder


def lines(steps: int, loss: float, accuracy: float) -> Figures:
    """Steps whose loss is their number, and an evaluation before the first and after the last."""
    train = [{"step": s, "train/loss": float(s), "train/pairs_per_second": 8.0} for s in range(1, steps + 1)]
    first = {"step": 0, "eval/loss": 0.7, "eval/rewards/accuracies": 0.0}
    last = {"step": steps, "eval/loss": loss, "eval/rewards/accuracies": accuracy, "eval/rewards/margins": 1.25}
    return [first, *train, last]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`python -m launch.compare` in this process: its exit code."""

    def run(*argv: object) -> int:
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, argv)])
        return run_program(compare.main)

    return run


def words_of(table: str) -> list[list[str]]:
    """The words of each line of a table, without its rules."""
    return [line.split() for line in table.splitlines() if line.strip() and "─" not in line]


def test_ranks_and_alphas_are_columns(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a sweep over adapters, beside a run of the whole model."""
    sweep = {"four": {"lora__rank": 4}, "eight": {"lora__rank": 8, "lora__alpha": 8.0}, "whole": {}}
    runs = [save_run(tmp_path / name, lines(1, loss=0.5, accuracy=0.9), **keys) for name, keys in sweep.items()]
    assert program(*runs, "--sort", "lora.rank") == 0
    table = words_of(capsys.readouterr().out)
    assert table[0][:4] == ["run", "steps", "lora.rank", "lora.alpha"]
    assert [row[4:6] for row in table if row[0] in sweep] == [["4", "null"], ["8", "8.0"], ["null", "null"]]
    entries = [hparams_entry(folder / "tensorboard") for folder in runs]
    assert [[entry.values.get(f"lora.{name}") for name in ("rank", "alpha")] for entry in entries] == [
        ["4", "null"],
        ["8", "8.0"],
        ["null", "null"],
    ]


def test_the_table(tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 1 to 20 have the losses 1 to 20: the mean of the last ten is 15.5; of 1 to 4 it is 2.5."""
    long = save_run(tmp_path / "long", lines(20, loss=0.5, accuracy=0.9), done=True, optim__lr=1e-5)
    short = save_run(tmp_path / "short", lines(4, loss=0.25, accuracy=0.8), optim__max_grad_norm=None)
    assert program(long, short) == 0
    assert words_of(capsys.readouterr().out) == [
        ["run", "steps", "optim.lr", "optim.max_grad_norm", "loss", "acc", "margin", "chosen", "rejected", "pairs/s"],
        ["short", "4", "of", "30", "1e-06", "null", "eval", "0.25", "0.8", "1.25"],
        ["train", "2.5", "8"],
        ["long", "20,", "done", "1e-05", "10.0", "eval", "0.5", "0.9", "1.25"],
        ["train", "15.5", "8"],
        ["sorted", "by", "eval/loss;", "train:", "mean", "of", "the", "last", "10", "steps"],
    ]


def test_sources_are_shown_by_their_paths(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    one = [SourceConfig("a.jsonl", holdout=0.5), SourceConfig("b.jsonl")]
    save_run(tmp_path / "x", lines(2, 0.5, 1.0), data__train=one)
    save_run(tmp_path / "y", lines(2, 0.6, 1.0), data__train=[SourceConfig("a.jsonl")])
    assert program(tmp_path / "x", tmp_path / "y") == 0
    shown = capsys.readouterr().out
    assert "a.jsonl holdout=0.5" in shown and "b.jsonl" in shown and "{" not in shown and "None" not in shown


def test_keys_that_do_not_change_the_run_are_no_columns(tmp_path: Path) -> None:
    one = save_run(tmp_path / "one", lines(2, 0.5, 0.5), train__log_every=1, train__eval_every=5, loss__beta=0.5)
    two = save_run(
        tmp_path / "two", lines(2, 0.5, 0.5), checkpoint__save_every=7, train__report_to=[], parallel__shard=2
    )
    assert compare.differing(compare.read_runs([one, two])) == ["loss.beta"]


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        (None, "acb"),  # losses of several betas do not compare: by accuracy
        ("eval/loss", "bac"),
        ("eval/rewards/accuracies", "acb"),
        ("train/loss", "cba"),
        ("loss.beta", "cab"),
        ("train.epochs", "bac"),  # which only b has
    ],
)
def test_the_order(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str], sort: str | None, order: str
) -> None:
    save_run(tmp_path / "a", lines(6, 0.5, 0.9), loss__beta=0.2)
    save_run(tmp_path / "b", lines(5, 0.4, 0.7), loss__beta=0.3, train__steps=None, train__epochs=2)
    save_run(tmp_path / "c", lines(4, 0.6, 0.8), loss__beta=0.1)
    assert program(*(tmp_path / name for name in "abc"), "--json", *(["--sort", sort] if sort else [])) == 0
    assert "".join(Path(run["run"]).name for run in json.loads(capsys.readouterr().out)) == order


def test_json_has_every_figure(tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "a", lines(2, 0.5, 0.9), loss__length_normalized=True)
    save_run(tmp_path / "b", [], train__steps=None)
    assert program(tmp_path / "a", tmp_path / "b", "--json") == 0
    metrics = {
        "eval/loss": 0.5,
        "eval/rewards/accuracies": 0.9,
        "eval/rewards/margins": 1.25,
        "train/loss": 1.5,
        "train/pairs_per_second": 8.0,
    }
    first, second = json.loads(capsys.readouterr().out)
    assert first == {
        "run": str(tmp_path / "a"),
        "done": False,
        "step": 2,
        "last_step": 30,
        "config": {"loss.length_normalized": True, "train.steps": 30},
        "metrics": metrics,
    }
    assert second | {"run": ""} == {
        "run": "",
        "done": False,
        "step": 0,
        "last_step": None,
        "config": {"loss.length_normalized": False, "train.steps": None},
        "metrics": {},
    }


def test_the_last_step_of_epochs_is_what_the_run_wrote_down(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "a", lines(2, 0.5, 0.9), train__steps=None)
    (folder / "provenance.json").write_text('[{"last_step": 99}, {"last_step": 77}]')
    assert compare.read_run(folder).last_step == 77


def test_names_are_what_the_runs_do_not_share(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "x" / "one", lines(2, 0.5, 0.9))
    save_run(tmp_path / "y", lines(2, 0.6, 0.9))
    assert program(tmp_path / "x" / "one", tmp_path / "y", tmp_path / "x" / "one" / ".") == 0
    assert [line[0] for line in words_of(capsys.readouterr().out)] == ["run", "x/one", "train", "y", "train", "sorted"]


# --- for TensorBoard -------------------------------------------------------------------------------------------------


def test_the_entries_have_the_keys_that_differ(tmp_path: Path, program: Callable[..., int]) -> None:
    """One of a type a column: where a value is null, or text, all are text. Written twice, there is one entry."""
    save_run(tmp_path / "a", lines(2, 0.5, 0.9), loss__beta=0.5, optim__max_grad_norm=None)
    save_run(tmp_path / "b", lines(2, 0.5, 0.9), data__eval=[SourceConfig("eval.jsonl")])
    for _ in range(2):
        assert program(tmp_path / "a", tmp_path / "b") == 0
    for name, beta, norm in (("a", 0.5, "null"), ("b", 0.1, "10.0")):
        entry = hparams_entry(tmp_path / name / "tensorboard")
        assert entry.columns == ["data.eval", "loss.beta", "optim.max_grad_norm"]
        assert (entry.values["loss.beta"], entry.values["optim.max_grad_norm"]) == (beta, norm)
        assert len(list((tmp_path / name).rglob(ENTRY))) == 1


def test_the_entry_of_one_run_has_the_usual_columns(tmp_path: Path, program: Callable[..., int]) -> None:
    """And is shown with the metrics of training where there was no evaluation."""
    save_run(tmp_path / "a", [{"step": 1, "train/loss": 1.0}])
    assert program(tmp_path / "a") == 0
    entry = hparams_entry(tmp_path / "a" / "tensorboard")
    assert entry.columns == [key for key in CHANGING if key in entry.values]
    assert entry.columns[:3] == ["loss.name", "loss.beta", "optim.lr"]
    assert entry.metrics[0] == "train/loss"


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compare, "write_entry", refuse)
    save_run(tmp_path / "a", lines(2, 0.5, 0.9))
    assert program(tmp_path / "a") == 0
    assert f"in {tmp_path / 'a'}: Permission denied" in capsys.readouterr().err


# --- wrong input -----------------------------------------------------------------------------------------------------


def error_of(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a program that ended with exit code 2."""
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert (code, captured.out, line[:7]) == (2, "", "error: ")
    return line


def test_a_folder_that_is_not_there(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "a", [])
    line = error_of(program(tmp_path / "a", tmp_path / "none"), capsys)
    assert line == f"error: command line: RUN: no such folder: {tmp_path / 'none'}; valid: a folder with a config.yaml"


def test_what_a_glob_finds_beside_runs_is_left_out_and_said(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "a", lines(2, 0.5, 0.9))
    (tmp_path / "cache").mkdir()
    (tmp_path / "jobs").mkdir()  # of a sweep: beside its runs in any case
    (tmp_path / "notes.txt").touch()
    assert program(*sorted(tmp_path.iterdir())) == 0
    captured = capsys.readouterr()
    assert [line[0] for line in words_of(captured.out)] == ["run", "a", "train", "sorted"]
    left_out = f"{tmp_path / 'cache'}, {tmp_path / 'notes.txt'}"
    assert f"WARNING: skipped, without a config.yaml: {left_out}\n" in captured.err


def test_no_run_at_all(tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(program(tmp_path), capsys)
    assert "none of the folders given has a config.yaml; valid: run folders" in line


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "loss: [1\n", "config.yaml:2: not valid YAML"),
        ("config.yaml", "loss\n", "config.yaml: is not a config"),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str], file: str, text: str, message: str
) -> None:
    (save_run(tmp_path / "a", []) / file).write_text(text)
    assert message in error_of(program(tmp_path / "a"), capsys)


def test_a_broken_line_of_metrics_is_named(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (save_run(tmp_path / "a", []) / "metrics.jsonl").write_text("{\n{}\n")
    assert program(tmp_path / "a") == 1
    assert "metrics.jsonl:1: not a line of metrics" in capsys.readouterr().err


def test_a_name_to_sort_by_that_nobody_knows(
    tmp_path: Path, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "a", lines(2, 0.5, 0.9))
    line = error_of(program(tmp_path / "a", "--sort", "eval/los"), capsys)
    assert line.startswith(
        "error: command line: --sort: no run has 'eval/los'; valid: a config key, loss.beta, or eval/"
    )


def test_it_runs_without_torch(tmp_path: Path) -> None:
    """As on a laptop: torch is not imported, and cannot be."""
    save_run(tmp_path / "a", lines(2, 0.5, 0.9))
    code = "import sys; sys.modules['torch'] = None; from launch import compare; compare.main()"
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, words_of(result.stdout)[1][0]) == (0, "a"), result.stderr
