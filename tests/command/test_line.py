"""Command lines divided into options."""

from collections.abc import Callable

import pytest

from dpo.base.errors import UserError
from dpo.command.line import (
    Option,
    Parser,
    check_once,
    own_flags,
    parse_arguments,
    replaced,
    split_options,
    split_words,
    with_quiet,
    words_of,
)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--loss.beta 0.5", [("loss.beta", "0.5")]),
        ("--loss.beta=0.5", [("loss.beta", "0.5")]),
        ("--loss.beta=", [("loss.beta", "")]),
        ("--a.b c=d", [("a.b", "c=d")]),
        ("--a.b=c=d", [("a.b", "c=d")]),
        ("--optim.lr -1", [("optim.lr", "-1")]),
        ("--optim.lr --quiet", [("optim.lr", None), ("quiet", None)]),
        ("--optim.lr", [("optim.lr", None)]),
        ("--optim.lr -h", [("optim.lr", None), (None, "-h")]),
        ("--quiet run", [("quiet", None), (None, "run")]),
        ("--sweep a=1 b=2", [("sweep", "a=1"), (None, "b=2")]),
        ("my.yaml", [("config", "my.yaml")]),
        ("train.run_dir=runs/x.yaml", [("train.run_dir", "runs/x.yaml")]),
        ("my.yaml data/a=b.yml", [("config", "my.yaml"), ("config", "data/a=b.yml")]),
        ("--config my.yml", [("config", "my.yml")]),
        ("runs/my.yml loss.beta=0.5", [("config", "runs/my.yml"), ("loss.beta", "0.5")]),
        ("data.train=[{path:a=b}]", [("data.train", "[{path:a=b}]")]),
        ("data.train[0].format=hh", [("data.train[0].format", "hh")]),
        ("--json my.yaml", [("json", None), ("config", "my.yaml")]),
        ("--json loss.beta=0.5", [("json", None), ("loss.beta", "0.5")]),
        ("--json=my.yaml", [("json", "my.yaml")]),
        ("--train.run_dir exp.lr=3", [("train.run_dir", "exp.lr=3")]),
        ("--model runs/lr.a=1/final", [("model", "runs/lr.a=1/final")]),
        ("--html page.html my.yaml", [("html", "page.html"), ("config", "my.yaml")]),
        ("-my.yaml beta=0.5 a.b", [(None, "-my.yaml"), (None, "beta=0.5"), (None, "a.b")]),
        ("-x --=1 -- ---y", [(None, "-x"), (None, "--=1"), (None, "--"), (None, "---y")]),
        ("", []),
    ],
)
def test_options(words: str, options: list[tuple[str | None, str | None]]) -> None:
    """Read off by hand; no word is lost."""
    found = split_options(words.split())
    assert [(option.key, option.value) for option in found] == options
    assert words_of(found) == words.split()


@pytest.mark.parametrize(
    ("key", "is_key", "is_config"),
    [("loss.beta", True, True), ("config", False, True), ("model", False, False), (None, False, False)],
)
def test_keys_of_the_config_have_a_dot(key: str | None, is_key: bool, is_config: bool) -> None:
    option = Option(key, "1.5", ())
    assert (option.is_key, option.is_config) == (is_key, is_config)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--loss.beta 0.1 --loss.beta=0.5", "loss.beta: given twice, '0.1' and '0.5'; valid: once"),
        ("loss.beta=0.1 --loss.beta 0.1", "loss.beta: given twice, '0.1' and '0.1'; valid: once"),
        ("a.yaml --config b.yaml", "config: given twice, 'a.yaml' and 'b.yaml'; valid: once"),
        ("--num 1 --num=2", "--num: given twice, '1' and '2'; valid: once"),
        ("--quiet --quiet", "--quiet: given twice; valid: once"),
    ],
)
def test_a_flag_is_given_once(words: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_once(split_options(words.split()))
    assert str(caught.value) == f"command line: {line}"


def test_some_flags_may_be_repeated() -> None:
    options = split_options("--env A=1 --env B=2 c.d=3".split())
    check_once(options, ("env",))
    with pytest.raises(UserError, match="--env: given twice, 'A=1' and 'B=2'"):
        check_once(options)


Reads = Callable[[Parser, list[str]], object]
READERS = pytest.mark.parametrize(
    ("make", "reads"),
    [(own_flags, split_words), (lambda prog: with_quiet(Parser(prog, allow_abbrev=False)), parse_arguments)],
    ids=["split_words", "parse_arguments"],
)
"""The programs that read a config, and the others."""


@READERS
def test_a_programs_own_flag_is_given_once(make: Callable[[str], Parser], reads: Reads) -> None:
    parser = make("python -m p")
    parser.add_argument("--num", type=int)
    with pytest.raises(UserError, match=r"^command line: --num: given twice, '1' and '2'; valid: once$"):
        reads(parser, ["--num", "1", "--num", "2"])


@pytest.mark.parametrize("words", ["a.yaml a.b=1 --c.d 2", "a.yaml --a.b 1 --c.d 2", "--a.b=1 a.yaml --c.d 2"])
def test_a_value_is_replaced(words: str) -> None:
    assert replaced(words.split(), "a.b", "3") == ["a.yaml", "--c.d", "2", "--a.b", "3"]


def test_a_programs_own_flags_and_the_configs_words() -> None:
    parser = own_flags("python -m p")
    parser.add_argument("--by-source", action="store_true")
    parser.add_argument("--num", type=int, default=3)
    own, rest = split_words(parser, ["--config", "a", "--num=5", "--by-source", "--loss.beta", "-1", "--by-sources"])
    assert (own.num, own.by_source) == (5, True)
    assert rest == ["--config", "a", "--loss.beta", "-1", "--by-sources"]


@READERS
@pytest.mark.parametrize(
    ("words", "place", "what"),
    [
        (["--num", "x"], "command line", "argument --num: invalid int value: 'x'"),
        (["--num"], "command line", "argument --num: expected one argument"),
        (["--by-source", "x"], "command line: x", "unexpected word"),
    ],
)
def test_wrong_flags_are_one_line_and_do_not_end_the_process(
    make: Callable[[str], Parser], reads: Reads, words: list[str], place: str, what: str
) -> None:
    parser = make("python -m p")
    parser.add_argument("--by-source", action="store_true")
    parser.add_argument("--num", type=int)
    with pytest.raises(UserError) as caught:
        reads(parser, words)
    error = caught.value
    assert (error.place, error.what, error.valid) == (place, what, "see python -m p --help")


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("--by-sorce", "unknown flag; did you mean --by-source?"),
        ("--by_source", "unknown flag; did you mean --by-source?"),
        ("--qiet", "unknown flag; did you mean --quiet?"),
        ("--zzz", "unknown flag"),
    ],
)
def test_an_unknown_flag_names_the_one_that_was_meant(word: str, what: str) -> None:
    for words in ([word, "3"], [f"{word}=3"]):
        parser = with_quiet(Parser("python -m p", allow_abbrev=False))
        parser.add_argument("--by-source")
        with pytest.raises(UserError) as caught:
            parse_arguments(parser, words)
        assert (caught.value.place, caught.value.what) == (f"command line: {word}", what)
