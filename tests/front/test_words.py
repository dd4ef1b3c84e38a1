"""What needs no torch is answered without it: by every program of `dpo NAME`, and by `python -m` of its module."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo.front.names import COMMANDS

HEAVY = ("torch", "transformers", "datasets")

RUN = """
import io, json, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
found = []
for words in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = list(words)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    found.append([code, out.getvalue(), err.getvalue(), [name for name in HEAVY if name in sys.modules]])
print(json.dumps(found))
""".replace("HEAVY", repr(HEAVY))


@dataclass(frozen=True)
class Answer:
    """How a command line ended."""

    code: int
    out: str
    err: str
    imported: list[str]


def answers(lines: Sequence[Sequence[str]], folder: Path) -> list[Answer]:
    """The answers to command lines, `python -m WORDS` each, in one process of their own."""
    command = [sys.executable, "-c", RUN, json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Answer(*found) for found in json.loads(done.stdout.splitlines()[-1])]


NEEDED = {
    "submit": ["--gpus-per-node", "8", "--time", "60", "--cluster", "local", "--dry-run"],
    "sample": ["--model", "m", "--prompts", "p.txt"],
    "export": ["--checkpoint", "c", "--out", "o"],
    "compare": ["runs"],
    "report": ["runs"],
    "push": ["runs", "org/name"],
    "replay": ["runs", "--step", "4"],
    "completion": ["bash"],
}
"""Words that a program requires."""

WRONG = {"a.yaml loss.beto=1": "loss.beto", "missing.yaml": "missing.yaml", "a.yaml loss.beta=x": "loss.beta"}
"""Words of a program that reads a config -> a part of the error."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text("model: {path: m}\ndata: {train: [{path: a.jsonl}]}\n")
    return tmp_path


def ways(name: str) -> list[list[str]]:
    """The beginnings of the command line of a program."""
    return [["dpo", name], [COMMANDS[name].module]]


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_words_are_answered_without_torch(name: str, folder: Path) -> None:
    wrong = {**WRONG, "--zzz=1": "--zzz"} if COMMANDS[name].has_config else {"--zzz=1": "--zzz"}
    cases = [(way, words, part) for way in ways(name) for words, part in wrong.items()]
    lines = [[*way, *NEEDED.get(name, []), *words.split()] for way, words, _ in cases]
    for case, answer in zip(cases, answers(lines, folder), strict=True):
        told = answer.err.splitlines()
        assert answer.code == 2 and answer.imported == [], (case, answer)
        assert told[-1].startswith("error: ") and case[2] in told[-1] and answer.out == "", (case, answer)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_one_usage_as_it_was_typed(name: str, folder: Path) -> None:
    """And imports no torch. `dpo configs` and `dpo completion` have this name alone."""
    module = COMMANDS[name].module
    progs = [f"dpo {name}", f"dpo {name}" if module.startswith("dpo.front.") else f"python -m {module}"]
    for prog, answer in zip(progs, answers([[*way, "--help"] for way in ways(name)], folder), strict=True):
        assert answer.code == 0 and answer.imported == [], answer
        assert answer.out.startswith(f"usage: {prog} ") and answer.out.count("usage:") == 1, answer.out
        assert ("--gpus N" in answer.out) == (COMMANDS[name].starts_ranks and prog.startswith("dpo "))
        assert "python -m dpo.train" not in answer.out or name == "train"


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.has_config])
def test_keys_and_schema_are_printed_once_without_torch(name: str, folder: Path) -> None:
    """Also by a program whose ranks `dpo` starts: they never start."""
    lines = [[*way, flag] for way in ways(name) for flag in ("--help-config", "--config-schema")]
    for line, answer in zip(lines, answers(lines, folder), strict=True):
        assert answer.code == 0 and answer.imported == [], (line, answer)
        if line[-1] == "--help-config":
            assert answer.out.count("  loss.beta: ") == 1, line
        else:
            assert json.loads(answer.out)["type"] == "object"


def test_the_answers_see_torch(tmp_path: Path) -> None:
    """The tests above would be of no use if none were ever seen."""
    (answer,) = answers([["dpo.distributed.world"]], tmp_path)
    assert "torch" in answer.imported
