"""The runs of --sweep: every combination, each in a folder of its own, behind as few reference passes as possible."""

import re
from pathlib import Path

import pytest

from dpo.base.errors import UserError
from dpo.config import load_config
from launch.arguments import read_arguments
from launch.sweep import PlannedRun, parse_choice, planned_runs, reference_passes

CONFIG = """
model: {path: sft}
data: {train: [{path: pairs.jsonl}]}
train: {run_dir: runs/mine}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG)
    return path


def plan(config: Path, *words: str) -> list[PlannedRun]:
    """The runs of a command line with more words."""
    return planned_runs(read_arguments(["--config", str(config), "--gpus-per-node", "8", "--time", "60", *words]))


def test_without_a_sweep_the_run_is_the_command_line(config: Path) -> None:
    (run,) = plan(config, "--loss.beta", "0.5")
    assert run.words == ("--config", str(config), "--loss.beta", "0.5")
    assert run.dir == Path("runs/mine")
    assert reference_passes([run]) == []


def test_the_product(config: Path) -> None:
    """3 values times 2 are six runs, the last key moving first."""
    runs = plan(config, "--sweep", "loss.beta=0.05,0.1,0.5", "optim.lr=5e-7,1e-6")
    assert [run.dir.name for run in runs] == [
        "beta=0.05,lr=5e-7",
        "beta=0.05,lr=1e-6",
        "beta=0.1,lr=5e-7",
        "beta=0.1,lr=1e-6",
        "beta=0.5,lr=5e-7",
        "beta=0.5,lr=1e-6",
    ]
    assert [(run.config.loss.beta, run.config.optim.lr) for run in runs][4] == (0.5, 5e-7)
    assert runs[4].words[2:] == (
        *("--loss.beta", "0.5", "--optim.lr", "5e-7"),
        *("--train.run_dir", "runs/mine/beta=0.5,lr=5e-7"),
    )


@pytest.mark.parametrize("word", ["train.run_dir=runs/x", "--train.run_dir=runs/x"])
def test_the_folder_of_a_run_replaces_that_of_the_sweep(config: Path, word: str) -> None:
    """A second --train.run_dir would be an error of the run."""
    run, _ = plan(config, word, "--sweep", "loss.beta=0.1,0.5")
    assert run.words[2:] == ("--loss.beta", "0.1", "--train.run_dir", "runs/x/beta=0.1")
    assert load_config(run.words, "dpo.train").train.run_dir == "runs/x/beta=0.1"


def test_one_reference_pass_for_what_does_not_change_it(config: Path) -> None:
    sweep = ("loss.beta=0.1,0.5", "optim.lr=1e-6,1e-5", "train.seed=0,1", "batch.pairs_per_step=32,64")
    runs = plan(config, "--sweep", *sweep)
    assert len(runs) == 16
    assert reference_passes(runs) == [runs[0].words]


@pytest.mark.parametrize(
    ("choice", "passes"),
    [
        ("model.path=sft,sft2", 2),
        ("data.max_length=512,1024", 2),
        ("parallel.compute_dtype=float32,bfloat16", 2),
        ("reference.path=sft,sft2", 2),
        ("data.train=[{path: a.jsonl}],[{path: b.jsonl}]", 2),
        ("data.train=[{path: a.jsonl}],[{path: a.jsonl, holdout: 9}]", 1),
        ("loss.name=sft,dpo", 1),
    ],
)
def test_a_reference_pass_for_each_set_of_rows(config: Path, choice: str, passes: int) -> None:
    """A hold-out moves pairs to the evaluation, whose rows are computed too; sft has none."""
    runs = plan(config, "--sweep", choice)
    found = reference_passes(runs)
    assert len(found) == passes
    assert not any("sft" in words[words.index("--loss.name") + 1] for words in found if "--loss.name" in words)


def test_a_sweep_of_sft_has_no_reference(config: Path) -> None:
    assert reference_passes(plan(config, "--loss.name", "sft", "--sweep", "optim.lr=1e-6,1e-5")) == []


def test_commas_in_brackets_do_not_part_values() -> None:
    assert parse_choice("optim.betas=[0.9, 0.95],[0.8, 0.9]") == ("optim.betas", ["[0.9, 0.95]", "[0.8, 0.9]"])
    assert parse_choice("data.train=[{path: a, split: b}]") == ("data.train", ["[{path: a, split: b}]"])


def test_names_are_safe_and_distinct(config: Path) -> None:
    """Folders of values that a file system or a shell would not take, or that look alike."""
    runs = plan(config, "--sweep", "model.path=a/b,a b,a_b,/x/" + "y" * 99, "reference.path=r,s")
    names = [run.dir.name for run in runs]
    assert len(set(names)) == 8
    assert "model.path=a_b,reference.path=r" in names
    assert all(re.fullmatch(r"[\w.=,+-]{1,120}", name) for name in names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "loss.beta"], "--sweep: got 'loss.beta'"),
        (["--sweep", "loss.beta="], "--sweep: got 'loss.beta='"),
        (["--sweep", "loss.beta=0.1,,0.2"], "--sweep: got 'loss.beta=0.1,,0.2'"),
        (["--sweep", "beta=0.1"], "--sweep: got 'beta=0.1'"),
        (["--sweep", "train.run_dir=a,b"], "train.run_dir contains the folders of all runs"),
        (["--sweep", "loss.beta=0.1", "loss.beta=0.2"], "loss.beta is given twice"),
        (["--loss.beta", "0.3", "--sweep", "loss.beta=0.1"], "loss.beta is given twice"),
        (["--loss.beta=0.3", "--sweep", "loss.beta=0.1"], "loss.beta is given twice"),
        (["--sweep", "loss.beta=0.1,0.10"], "beta=0.1 and beta=0.10 are the same run"),
        (["--sweep", "loss.beta=0.1,-1"], "loss.beta: must be > 0, got -1"),
        (["--sweep", "loss.bta=0.1"], "loss.bta: unknown key"),
        (["--sweep", "loss.name=dpo,ipo", "loss.label_smoothing=0,0.1"], "loss.name ipo has no label smoothing"),
    ],
)
def test_wrong_sweeps(config: Path, words: list[str], message: str) -> None:
    """Every combination is checked as a command line is."""
    with pytest.raises(UserError) as failure:
        plan(config, *words)
    assert str(failure.value).startswith("command line: ") and message in str(failure.value)
