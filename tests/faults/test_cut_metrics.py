"""metrics.jsonl of an interrupted run: cut where its checkpoint ends, each step once, and what is missing is told."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from dpo.run_folder.evaluations import drop_evaluations_after, evaluation_steps, write_evaluation
from dpo.run_folder.files import drop_metrics_after, read_metrics, spans
from tests.support.runs import changed, logged, run, six_steps, train_lines, without_clock


def test_cutting_is_one_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash before the replacement leaves the file as it was."""
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(lines)

    def crash(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            drop_metrics_after(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    drop_metrics_after(tmp_path, 2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]


def test_numbers_survive_being_cut(tmp_path: Path) -> None:
    """Every float, and the NaN of an evaluation that went wrong, is the same number after a rewrite."""
    values = [0.1, 1 / 3, 1e-300, 123456789.123456789, -0.0]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "values": values, "nan": float("nan")}) + "\n")
    drop_metrics_after(tmp_path, 1)
    (line,) = read_metrics(tmp_path)
    assert line["values"] == values
    assert line["nan"] != line["nan"]


@pytest.fixture
def dead(dead_root: Path, tmp_path: Path) -> Path:
    """A copy of a run folder that died before step 6, with a checkpoint of step 4."""
    return Path(shutil.copytree(dead_root / "dead", tmp_path / "dead"))


def written(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_tells_what_its_metrics_lack(dead_root: Path, dead: Path, tmp_path: Path) -> None:
    """A lost line stays lost; a doubled one, at first with another loss, is the later one. The weights do not care."""
    whole = shutil.copytree(dead, tmp_path / "whole")
    lines = written(dead)
    earlier = [line | {"train/loss": 9.0} if line["step"] == 3 and "train/loss" in line else line for line in lines]
    lost = [line for line in lines if not (line["step"] == 2 and "train/loss" in line)]
    third = next(i for i, line in enumerate(lost) if line["step"] == 3)
    lost.insert(third, next(line for line in earlier if line["step"] == 3))
    (dead / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lost))
    for folder in (whole, dead):
        run(six_steps(dead_root, folder))
    assert train_lines(whole)[2]["step"] == 3
    expected = [line for line in without_clock(train_lines(whole)) if line["step"] != 2]
    assert without_clock(train_lines(dead)) == expected
    told = [line for line in logged(dead) if "metrics.jsonl" in line]
    path = dead / "metrics.jsonl"
    assert told == [
        f"{path}: step 3 stood there more than once; the last line of each is kept",
        f"{path}: step 2 is missing; the run goes on without",
    ]
    assert not [line for line in logged(whole) if "metrics.jsonl" in line]


def test_lines_of_one_step_and_other_kinds_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first step: of the reference pass, of the check and of the evaluation."""
    names = ["reference/rows_computed", "first_step/spread", "eval/loss"]
    lines = [{"step": 0, name: 1.0} for name in names] + [{"step": 1, "train/loss": 1.0}, {"step": 1, "eval/loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drop_metrics_after(tmp_path, 1)
    assert read_metrics(tmp_path) == lines and capsys.readouterr().err == ""


def test_the_evaluation_of_the_checkpoint_stays(tmp_path: Path) -> None:
    """A run goes on from step 2 and does not evaluate it again; what came later goes."""
    for step in (0, 2, 3, 4):
        write_evaluation(tmp_path, step, {"logps_chosen": np.zeros(1)})
    drop_evaluations_after(tmp_path, 2)
    assert evaluation_steps(tmp_path) == [0, 2]


def test_lines_that_changed_places_are_put_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves, and the losses that a spike is measured by, go by the order of the file."""
    lines = [{"step": 0, "eval/loss": 1.0}, {"step": 0, "a/b": 1.0}]
    lines += [{"step": step, f"{kind}/loss": 1.0} for step in (1, 2, 3) for kind in ("train", "eval")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(lines[i]) + "\n" for i in (4, 5, 0, 1, 6, 2, 3, 7)))
    drop_metrics_after(tmp_path, 3)
    assert read_metrics(tmp_path) == lines
    told = f"{tmp_path}/metrics.jsonl: its lines were not in the order of the steps, and are put in order\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "tra'])
def test_a_file_that_is_gone_empty_or_cut_off_is_told(tmp_path: Path, content: str | None, capsys) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    drop_metrics_after(tmp_path, 9)
    assert capsys.readouterr().err == f"{tmp_path}/metrics.jsonl: steps 1 to 9 are missing; the run goes on without\n"
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def lines_of(steps: Iterable[int]) -> str:
    return "".join(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in steps)


BEGINS, GOES_ON = ({"first_step": 101, "goes_on": goes_on} for goes_on in (False, True))


@pytest.mark.parametrize(
    ("starts", "steps", "missing"),
    [
        ([BEGINS, GOES_ON], range(101, 111), None),
        ([{"first_step": 1, "goes_on": False}, BEGINS], range(101, 111), None),  # the first died before it saved
        ([BEGINS], range(103, 111), "steps 101 to 102 are"),
        ([BEGINS], [], "steps 101 to 110 are"),
        ([{"first_step": 1, "goes_on": False}, GOES_ON], range(101, 111), "steps 1 to 100 are"),
        ([{"version": "0.2.0"}, GOES_ON], range(101, 111), None),
        ("damaged", [*range(101, 105), *range(106, 111)], "step 105 is"),
    ],
)
def test_steps_of_another_run_are_not_missing(
    tmp_path: Path, starts: object, steps: Iterable[int], missing: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that began at another's step 100 has lines from 101 on."""
    (tmp_path / "provenance.json").write_text(json.dumps(starts))
    (tmp_path / "metrics.jsonl").write_text(lines_of(steps))
    drop_metrics_after(tmp_path, 110)
    told = f"{tmp_path}/metrics.jsonl: {missing} missing; the run goes on without\n" if missing else ""
    assert capsys.readouterr().err == told


def test_a_run_from_another_runs_checkpoint_lacks_nothing(dead_root: Path, dead: Path, tmp_path: Path) -> None:
    """It begins at step 5, ends at 6, and is told to end at 7."""
    config = six_steps(dead_root, tmp_path / "second", checkpoint__resume=str(dead), checkpoint__save_every=1)
    run(config)
    run(changed(config, train__steps=7))
    assert [line["step"] for line in train_lines(tmp_path / "second")] == [5, 6, 7]
    assert not [line for line in logged(tmp_path / "second") if "missing" in line]


def test_steps_as_words() -> None:
    """The first four spans."""
    assert spans({4}) == "step 4"
    assert spans([6, 4, 5]) == "steps 4 to 6"
    assert spans([1, 3, 4, 6, 9]) == "steps 1, 3 to 4, 6, 9"
    assert spans(range(1, 12, 2)) == "steps 1, 3, 5, 7, …"
