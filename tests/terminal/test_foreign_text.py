"""Texts of data, files, configs and jobs that would steer a terminal: every command's output shows them as they are."""

import json
import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig

from dpo.config import SourceConfig, to_yaml
from dpo.config.strict_yaml import parse_yaml
from dpo.demo.program import answers_table
from dpo.demo.world import questions
from dpo.doctor import program as doctor
from dpo.encode.tokenizer import load_tokenizer
from dpo.inspect.inspection import inspect_data
from dpo.inspect.terminal import make_console, print_inspection
from dpo.pairs.prepare import prepare_data
from dpo.sample.program import show_json, show_table
from dpo.score.program import Scores, show
from dpo.terminal.console import harmless_json, progress, say, warn
from launch import compare, follow, submit
from launch.node import NodeJob
from launch.reports import Outcome
from tests.launch.test_compare import lines, save_run
from tests.support.data_fixtures import BOS, EOS, VOCAB_SIZE, make_config, make_tokenizer, write_jsonl
from tests.support.runs import make_config as run_config
from tests.support.screen import terminal

pytest_plugins = ["tests.support.data_plugin"]

CODES = "\x1b]0;title\x07\x1b[2J\x1b[31m\x9b3A\x90q\x9c\u202eback\u2066\u200f\u2028\r\b\x7f"
"""A title, a cleared screen, a color, C1 controls that move the cursor and begin a string, changes of direction, a
separator of lines, a return, a backspace, and a delete."""
FOREIGN = f"a{CODES}\nerror: forged"


def assert_harmless(text: str, is_one_line: bool = True) -> None:
    """Nothing steers the terminal, and no line begins as the text of somebody else wants."""
    steering = {character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs")}
    assert steering <= set("\n\t"), sorted(map(hex, map(ord, steering)))
    assert "a␛]0;title␇␛[2J" in re.sub(r"[\s│┃]", "", text)
    assert not is_one_line or not re.search(r"^\W*error: forged", text, re.MULTILINE)


@pytest.mark.usefixtures("hf_cache")
def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A column's name, the path of the data, the text of a pair, in their sections."""
    name = FOREIGN.replace("/", "")
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "model")
    path = write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": FOREIGN, "chosen": "b", "rejected": "c", name: 1}] * 2)
    config = make_config(SourceConfig(path), tokenizer=str(tmp_path / "model"))
    model = LlamaConfig(vocab_size=VOCAB_SIZE, bos_token_id=BOS, eos_token_id=EOS)
    data = prepare_data(config, model)
    inspection = inspect_data(config, model, load_tokenizer(str(tmp_path / "model")), data, 1)
    assert any(name in line for line in inspection.report.lines())
    print_inspection(inspection, make_console())
    shown = capsys.readouterr().out
    assert_harmless(shown)
    assert "columns not used: " in shown
    console = make_console()
    with console.capture() as colored:
        console._force_terminal = True
        print_inspection(inspection, console)
    assert not re.sub(r"\x1b\[[0-9;]*m", "", colored.get()).count("\x1b")


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a run folder, and the values of keys that differ."""
    names = [FOREIGN.replace("/", ""), "b"]
    for name in names:
        save_run(tmp_path / name, lines(2, 0.5, 0.5), data__train=[SourceConfig(f"{name}.jsonl")], model__path=name)
    monkeypatch.setattr("sys.argv", ["compare", *(str(tmp_path / name) for name in names)])
    compare.main()
    shown = capsys.readouterr()
    assert_harmless(shown.out, is_one_line=False)  # a long name is folded
    assert_harmless(f"{shown.err}a␛]0;title␇␛[2J")


def test_sample_and_score(capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts, answers, the names of models and sources."""
    questions: list[Any] = [SimpleNamespace(prompt=FOREIGN)]
    show_table(questions, {FOREIGN: [FOREIGN]})
    assert_harmless(capsys.readouterr().out, is_one_line=False)
    show(Scores(FOREIGN, FOREIGN, FOREIGN, 0.1, "evaluation", {"loss": 1.0}, {FOREIGN: {"loss": 1.0}}))
    assert_harmless(capsys.readouterr().out)
    show_json(questions, {"policy": [FOREIGN]})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"prompt": FOREIGN, "policy": FOREIGN}
    assert shown.rstrip("\n").isprintable()


def test_json_means_the_same() -> None:
    """Also beyond the first plane, and of what is half a character; what can be seen stays."""
    text = "é ☃ \U0001f600 \U000e0041 \ud800 \x9b"
    shown = harmless_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(shown) == text and shown == '"é ☃ \U0001f600 \\udb40\\udc41 \\ud800 \\u009b"'


def test_doctor_and_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """What libraries and drivers say; what a model answers."""
    doctor._print(SimpleNamespace(is_main=True), [FOREIGN])  # type: ignore[arg-type]
    assert_harmless(capsys.readouterr().out)
    answers: Any = SimpleNamespace(texts=[f"{FOREIGN}[red]"])
    Console(width=300).print(answers_table(questions(1, 0), answers, answers))
    shown = capsys.readouterr().out
    assert_harmless(shown, is_one_line=False)
    assert "[red]" in shown


def test_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log of a job that is followed, its report, and the names of its folders."""
    (tmp_path / "log").write_text(FOREIGN)
    follow._Log(tmp_path / "log").show()
    assert_harmless(capsys.readouterr().err, is_one_line=False)
    job = NodeJob(SimpleNamespace(module=FOREIGN), tmp_path / "run" / "jobs" / "1", 40, 1)  # type: ignore[arg-type]
    job.folder.mkdir(parents=True)
    job.tell(Outcome("failed", FOREIGN, 1, FOREIGN))
    assert_harmless(capsys.readouterr().err, is_one_line=False)
    submission = follow.Submission("local", FOREIGN, FOREIGN)
    plan: Any = SimpleNamespace(lines=[FOREIGN], runs=[SimpleNamespace(dir=Path(FOREIGN))])
    submit.tell(plan, [submission])
    assert_harmless(capsys.readouterr().out)


def test_a_config_that_is_printed_means_the_same() -> None:
    config = run_config(FOREIGN, "data", FOREIGN)
    shown = to_yaml(config)
    assert parse_yaml(shown, str, "")["model"]["path"] == FOREIGN
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "ü" in to_yaml(run_config("ü", "data", "run"))


def test_lines_and_bars(capsys: pytest.CaptureFixture[str]) -> None:
    """The name of a file stands in the label of a bar."""
    say(FOREIGN)
    warn(FOREIGN)
    assert_harmless(capsys.readouterr().err)
    with terminal() as screen, progress(f"tokenizing {FOREIGN}", 2, "rows", True) as bar:
        bar.advance(2)
    assert_harmless(re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", screen.sent).replace("a␛", "a␛", 1), is_one_line=False)
