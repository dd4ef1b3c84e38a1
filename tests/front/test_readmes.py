"""The commands of the READMEs exist, with their flags and keys of the config; so do the tests that they name."""

import re
import shlex
from pathlib import Path

import pytest

from dpo.command.line import split_options
from dpo.config.keys import KEYS
from dpo.config.trl_names import TRL_NAMES
from dpo.front.completion import parser_of
from dpo.front.names import COMMANDS

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ("configs", "dpo", "launch", "tests"))]


NO_KEYS = ("sigmoid", "accelerate")
"""Words of the table that are no keys of TRL: a value of loss_type, and a program."""


def commands() -> list[str]:
    """Each line `dpo NAME ...` of a block of code or between backquotes, without its comment."""
    found: list[str] = []
    for path in READMES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^    (dpo [a-z].*)$", text, re.MULTILINE) + re.findall(r"`(dpo [a-z][^`]*)`", text)
    return sorted({shlex.join(shlex.split(line, comments=True)) for line in found})


def test_there_are_commands() -> None:
    """At least as many as programs: a pattern that finds none would test nothing."""
    assert len(commands()) > len(COMMANDS)


@pytest.mark.parametrize("line", commands())
def test_a_command_of_a_readme_exists(line: str) -> None:
    name, *words = shlex.split(line)[1:]
    flags = set(re.findall(r"--[\w-]+", parser_of(name, COMMANDS[name]).format_help()))
    for option in split_options(words):
        assert option.key in (None, "config", *KEYS) or f"--{option.key}" in flags, option


def test_every_command_stands_in_the_table() -> None:
    """But the demo, which `make demo` runs, and completion, which is no program of a run."""
    table = (ROOT / "dpo" / "README.md").read_text(encoding="utf-8").partition("## Programs")[2].partition("\n## ")[0]
    names = re.findall(r"^\| `(\w+)[^`]*` \|", table, re.MULTILINE)
    assert sorted(names[1:]) == sorted(COMMANDS.keys() - {"demo", "completion"}), "the first is the heading, dpo"


def test_the_names_of_trl_are_those_of_the_table() -> None:
    """Each row that gives single keys gives the counterparts that an error gives."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Coming from TRL")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", table, re.MULTILINE)
    names = [(name, ours) for theirs, ours in rows for name in re.findall(r"`(\w+)`", theirs)]
    names = [(name, ours) for name, ours in names if name not in NO_KEYS]
    assert len(rows) == len(re.findall(r"^\| [^-]", table, re.MULTILINE)) - 1 > 5, "all but the heading"
    for name, ours in names:
        key = TRL_NAMES[name].key
        assert key is None or key in ours or key.partition(".")[0] in ours, (name, key)


def named_tests() -> list[tuple[str, str]]:
    """Each test between backquotes in the trainer's README: (file below tests/, name of the test, or empty); `::name`
    is of the file before it.
    """
    found, file = [], ""
    for word in re.findall(r"`([^`\s]+)`", (ROOT / "dpo" / "README.md").read_text(encoding="utf-8")):
        path, _, name = word.removeprefix("tests/").partition("::")
        if path.endswith(".py") and Path(path).name.startswith("test_"):
            file = path
        if file and (path == file or (name and not path)):
            found.append((file, name))
    return found


def test_there_are_tests_in_the_tables() -> None:
    assert len(named_tests()) > 20


@pytest.mark.parametrize(("file", "name"), named_tests())
def test_a_test_of_the_readme_exists(file: str, name: str) -> None:
    path = ROOT / "tests" / file
    assert path.is_file()
    assert not name or re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE)
