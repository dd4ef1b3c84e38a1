"""The text of --help: a program's own options first, each with its default, and an example; keys by --help-config."""

import re
from collections.abc import Callable, Sequence

import pytest

from dpo.base.errors import UserError
from dpo.command.line import SWITCHES
from dpo.config.keys import KEYS
from dpo.doctor import arguments as doctor
from dpo.estimate import arguments as estimate
from dpo.inspect import arguments as inspect
from dpo.score import arguments as score
from dpo.train import words as train
from launch import arguments as submit

READERS: dict[str, Callable[[Sequence[str]], object]] = {
    "dpo.inspect": inspect.read_arguments,
    "dpo.estimate": estimate.read_arguments,
    "dpo.doctor": doctor.read_arguments,
    "dpo.score": score.read_arguments,
    "dpo.train": train.read_arguments,
    "launch.submit": submit.read_arguments,
}
OWN = {
    "dpo.inspect": "html examples",
    "dpo.estimate": "ranks ranks-per-node prompt-tokens completion-tokens device mfu link-gb-s node-link-gb-s measured"
    " json",
    "dpo.doctor": "report",
    "dpo.score": "model adapter by-source json",
    "dpo.train": "",
}


def printed(program: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        READERS[program](words)
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("program", OWN)
def test_own_options_come_first(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(program, capsys, "--help")
    assert re.findall(r"^  (?:-h, )?--([\w-]+)", text, re.MULTILINE) == [*OWN[program].split(), "config", *SWITCHES]
    assert text.startswith(f"usage: python -m {program} FILE.yaml") and f"example: python -m {program} my.yaml " in text
    assert not [key for key in KEYS if f"{key}:" in text]


@pytest.mark.parametrize("program", OWN)
def test_each_option_tells_its_default(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Or that it is required; one that takes no value has none."""
    own, _, _ = printed(program, capsys, "-h").partition("options of every program")
    for option in re.split(r"^  --", own, flags=re.MULTILINE)[1:]:
        has_value = re.match(r"[\w-]+ [A-Z]", option)
        assert not has_value or re.search(r"\(default: .*\)|; required", " ".join(option.split())), option


@pytest.mark.parametrize("program", READERS)
def test_keys_and_schema_need_no_other_words(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(program, capsys, "--help-config")
    assert all(f"\n  {key}: " in text for key in KEYS)
    assert printed(program, capsys, "--config-schema").startswith("{")


@pytest.mark.parametrize("program", OWN)
def test_a_typo_in_a_flag(program: str) -> None:
    """Of the program itself where it has flags."""
    flag = f"{OWN[program]} quiet".split()[0]
    with pytest.raises(UserError, match=f"unknown flag; did you mean --{flag}\\?"):
        READERS[program](["model.path=m", "data.train=[{path: a}]", f"--{flag}x"])
