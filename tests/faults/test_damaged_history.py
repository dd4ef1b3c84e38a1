"""What was damaged beside the checkpoints stops no run that can do without it, and is never silently thrown away."""

import json
import random
import shutil
from pathlib import Path

import pytest

from dpo.base.errors import RunError
from dpo.config import Config
from dpo.demo.world import preference_row, questions, save_model, save_rows
from dpo.encode.tokenizer import load_tokenizer
from dpo.run_folder.files import read_metrics
from tests.support.boards import points_of
from tests.support.models import save_model as save_bare_model
from tests.support.runs import changed, exit_code, make_config, run, train_lines

pytestmark = pytest.mark.xdist_group("damaged-history")


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a run that has made its four steps; to be copied."""
    root = tmp_path_factory.mktemp("damaged-history")
    rng = random.Random(0)
    rows = [preference_row(question, 2, rng) for question in questions(10, 0)]
    save_model(root / "model", rows, 0)
    save_rows(root / "pairs.jsonl", rows)
    config = make_config(
        root / "model",
        root / "pairs.jsonl",
        root / "run",
        batch__pairs_per_step=4,
        train__steps=4,
        optim__warmup_steps=0,
        checkpoint__save_every=2,
        eval__samples=1,
        eval__max_new_tokens=3,
        reference__cache_dir=str(root / "cache"),
    )
    run(config)
    return config


@pytest.fixture
def stopped(four_steps: Config, tmp_path: Path) -> Config:
    """The config of a run of six steps, which has made four."""
    shutil.copytree(str(four_steps.train.run_dir), tmp_path / "run")
    return changed(four_steps, train__run_dir=str(tmp_path / "run"), train__steps=6)


def the_event_file(folder: Path) -> Path:
    [path] = [path for path in (folder / "tensorboard").glob("events.out.tfevents.*") if "hparams" not in path.name]
    return path


@pytest.mark.parametrize("place", ["length", "content"])
def test_a_damaged_event_file_goes_on_from_what_can_be_read(stopped, place: str, capsys, tmp_path: Path) -> None:
    """The middle of the file is 0xff. The file as it was stays, under a name that TensorBoard does not look for."""
    path = the_event_file(tmp_path / "run")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + (200 if place == "length" else 12)] = b"\xff" * (200 if place == "length" else 12)
    path.write_bytes(bytes(data))
    assert exit_code(stopped) == 0
    copies = list(path.parent.glob("*damaged*"))
    assert [copy.read_bytes() for copy in copies] == [bytes(data)] * len(copies)
    assert len(copies) == capsys.readouterr().err.count("is damaged: its charts keep")
    steps = [[step for step, _ in line] for _, line in points_of(tmp_path / "run" / "tensorboard").items()]
    assert all(len(line) == len(set(line)) and line[-1] == 6 for line in steps if len(line) > 1)


def test_a_foreign_event_file_is_left_alone(stopped, tmp_path: Path) -> None:
    foreign = tmp_path / "run" / "tensorboard" / "events.out.tfevents.profile"
    foreign.write_bytes(b"")
    assert exit_code(stopped) == 0 and foreign.read_bytes() == b""


DEEP = pytest.param("[" * 100_000, id="deep")
"""Python's reader of JSON gives up."""


@pytest.mark.parametrize(
    "text",
    ['[{"version":', "", "[{}]", "{}", "[1]", DEEP, '[{"first_step": "x", "layout": {}}]'],
)
def test_a_broken_provenance_is_put_aside(stopped, text: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / "provenance.json"
    path.write_text(text)
    assert exit_code(stopped) == 0
    assert json.loads(path.read_text())[-1]["last_step"] == 6


def test_a_changed_letter_of_the_references_answers_is_found(stopped, tmp_path: Path, capsys) -> None:
    """In no fact that they depend on, and still text: they are given again, and said so."""
    stopped = changed(stopped, data__eval=stopped.data.train)
    assert exit_code(stopped) == 0
    path = tmp_path / "run" / "answers" / "reference.json"
    content = json.loads(path.read_text())
    capsys.readouterr()
    path.write_text(json.dumps(content | {"answers": [row | {"reference": "x"} for row in content["answers"]]}))
    assert exit_code(changed(stopped, train__steps=8)) == 0
    assert f"{path} does not match this run's format: the reference's answers are generated" in capsys.readouterr().err
    assert json.loads(path.read_text()) == content


@pytest.mark.parametrize("text", ['{"answers": []}', '{"belongs_to": {}, "answers": [{"reference": null}]}', "{"])
def test_broken_answers_are_given_again(stopped, text: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / "answers" / "reference.json"
    path.parent.mkdir(exist_ok=True)
    (path.parent / "step-best.jsonl").write_text("mine")
    path.write_text(text)
    assert exit_code(stopped) == 0


@pytest.mark.parametrize("line", [b"{broken", b"[]", b'{"train/loss": 1}', b"\xff\xfe", b"null", DEEP])
def test_a_broken_line_of_metrics_is_named(stopped, line: bytes | str, tmp_path: Path, capsys) -> None:
    """Its place stands in the one line of the error; the run can be mended, nothing is thrown away."""
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = (line.encode() if isinstance(line, str) else line) + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(RunError, match=r"metrics\.jsonl:3: not a line of metrics"):
        read_metrics(tmp_path / "run")
    assert exit_code(stopped) == 1
    assert "metrics.jsonl:3: not a line of metrics" in capsys.readouterr().err
    assert path.read_bytes() == b"".join(lines)


def test_a_finished_run_without_its_model_exports_it_again(stopped, tmp_path: Path) -> None:
    assert exit_code(stopped) == 0
    (tmp_path / "run" / "final" / "model.safetensors").unlink()
    assert exit_code(stopped) == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "llama"])
def test_a_model_folder_without_a_tokenizer_has_none(family: str, tmp_path: Path) -> None:
    """transformers makes an empty tokenizer for some families from the model's config alone."""
    save_bare_model(tmp_path / "bare", family)
    with pytest.raises(ValueError, match="it holds none"):
        load_tokenizer(str(tmp_path / "bare"))
