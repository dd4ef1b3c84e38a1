"""Command lines: the one place that divides them into options and a program's own flags.

`--config run.yaml --loss.beta=0.5 --quiet` is three options: ("config", "run.yaml"), ("loss.beta", "0.5") and
("quiet", None). `run.yaml loss.beta=0.5 --quiet` is the same: a bare SECTION.KEY=VALUE is a key of the config, and
another bare word that ends with .yaml or .yml its file. A value may begin with one dash, except for -h. Names are not
checked here: argparse checks a program's own flags, and `dpo.config.reading` the keys of a config.
"""

import argparse
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from dpo.base.errors import UserError
from dpo.command.likeness import closest, meant

COMMAND_LINE = "command line"
"""The place of an error in the arguments of a program."""
QUIET = "leave out progress messages; results, warnings and errors stay"
"""The help text of --quiet."""
SWITCHES: Mapping[str, str] = {
    "help": "print this text and exit",
    "help-config": "print the keys of the config, with types and defaults, and exit",
    "config-schema": "print a JSON schema of the YAML file, for editors, and exit",
    "print_config": "print the resolved config as YAML and exit",
    "quiet": QUIET,
}
"""The flags of every program that take no value, so that the word after one is not its value, with their help texts."""

# --- options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option of a command line, or a word that belongs to none."""

    key: str | None
    """`loss.beta` of --loss.beta; None for a word that follows no key."""
    value: str | None
    """None where the key has none."""
    words: tuple[str, ...]
    """The option as it was typed."""

    @property
    def is_config(self) -> bool:
        """Whether the option is a key of the config, or the config's file."""
        return self.is_key or self.key == "config"

    @property
    def is_key(self) -> bool:
        """Whether the option is a key of the config, SECTION.KEY: a program's own flags have no dot."""
        return self.key is not None and "." in self.key

    @property
    def is_help(self) -> bool:
        """Whether the option is --help or -h."""
        return self.words in (("--help",), ("-h",))

    @property
    def is_bare(self) -> bool:
        """Whether the option was typed as a word without dashes: run.yaml, or loss.beta=0.5."""
        return self.key is not None and not self.words[0].startswith("--")


def split_options(argv: Sequence[str]) -> list[Option]:
    """Returns the options of a command line in order: --KEY VALUE, --KEY=VALUE, --KEY alone, FILE.yaml,
    SECTION.KEY=VALUE, and other words.

    A flag without a dot, but --config, does not take FILE.yaml and SECTION.KEY=VALUE as its value, since it may be a
    flag that has none (--json run.yaml).
    """
    words, options = list(argv), []
    while words:
        word = words.pop(0)
        key, equals, value = word[2:].partition("=")
        if not word.startswith("--") or not key or key.startswith("-"):
            options.append(_bare(word))
        elif equals:
            options.append(Option(key, value, (word,)))
        elif not words or not _takes(key, words[0]):
            options.append(Option(key, None, (word,)))
        else:
            options.append(Option(key, words[0], (word, words.pop(0))))
    return options


def _bare(word: str) -> Option:
    setting = re.fullmatch(r"([A-Za-z]\w*\.[^\s=/]+)=(.*)", word, re.DOTALL)
    if setting:
        return Option(setting[1], setting[2], (word,))
    is_file = word.endswith((".yaml", ".yml")) and not word.startswith("-")
    return Option("config" if is_file else None, word, (word,))


def _takes(key: str, word: str) -> bool:
    """Returns whether `word` is the value of the flag --KEY before it."""
    if key in SWITCHES or word == "-h" or word.startswith("--"):
        return False
    return key == "config" or "." in key or _bare(word).key is None


def words_of(options: Sequence[Option]) -> list[str]:
    """Returns the options as they were typed."""
    return [word for option in options for word in option.words]


def replaced(words: Sequence[str], key: str, value: str) -> list[str]:
    """Returns a command line with --KEY VALUE in the place of any value that it gives the key."""
    return [*words_of([option for option in split_options(words) if option.key != key]), f"--{key}", value]


def check_once(options: Sequence[Option], repeatable: Collection[str] = ()) -> None:
    """Raises UserError for the first flag that is given twice, unless it is one of `repeatable`."""
    first: dict[str, Option] = {}
    for option in options:
        if option.key is None or option.key in repeatable:
            continue
        if option.key in first:
            values = [shown.value for shown in (first[option.key], option) if shown.value is not None]
            both = f", {' and '.join(map(repr, values))}" if values else ""
            name = option.key if option.is_config else f"--{option.key}"
            raise UserError(f"{COMMAND_LINE}: {name}", f"given twice{both}", "once")
        first[option.key] = option


# --- a program's own flags --------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError where argparse prints its usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's message."""
        raise UserError(COMMAND_LINE, message, f"see {self.prog} --help")


def with_quiet(parser: Parser) -> Parser:
    """Adds --quiet, which every program has, and returns the parser."""
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    return parser


def parse_arguments(
    parser: Parser, words: Sequence[str] | None = None, repeatable: Collection[str] = ()
) -> argparse.Namespace:
    """Returns the arguments of a command line.

    Args:
        parser: the program's flags; see `with_quiet`.
        words: the command line; None: this process's own.
        repeatable: flags that may be given more than once.

    Raises UserError where a flag is wrong, or given twice.
    """
    argv = sys.argv[1:] if words is None else words
    check_once([option for option in split_options(argv) if not option.is_bare], repeatable)
    return _parsed(parser, argv)


def _parsed(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments in `words`. Raises UserError, for an unknown flag with the one that was probably meant."""
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].partition("=")[0]
        flag = closest(name, [f"--{flag}" for flag in names_of(arguments)]) if name.startswith("-") else None
        what = f"unknown flag{meant(flag)}" if name.startswith("-") else "unexpected word"
        raise UserError(f"{COMMAND_LINE}: {name}", what, f"see {parser.prog} --help")
    return arguments


def names_of(arguments: argparse.Namespace) -> list[str]:
    """Returns the names of a program's flags, without dashes at their beginning."""
    return [name.replace("_", "-") for name in vars(arguments)]


def own_flags(prog: str, description: str = "", example: str = "") -> Parser:
    """Returns a parser for the flags that a program has beside the config's keys; see `split_words`.

    Args:
        prog: the program as it was typed: `python -m` and its module, or `dpo` and its name.
        description: what the program does.
        example: words of a command line after FILE.yaml.
    """
    words = example or "loss.beta=0.5"
    parser = Parser(
        prog,
        usage=f"{prog} FILE.yaml [SECTION.KEY=VALUE ...] [--FLAG VALUE ...]",
        description=description,
        epilog=f"example: {prog} my.yaml {words}",
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("options of every program that reads a config")
    about = "YAML file of SECTION: {KEY: VALUE}, also without --config; SECTION.KEY=VALUE on the command line, or"
    about += " --SECTION.KEY VALUE, replaces a value of it (a list as a whole)"
    group.add_argument("--config", metavar="FILE.yaml", help=about, default=argparse.SUPPRESS)
    for flag, about in SWITCHES.items():
        names = ["-h", "--help"] if flag == "help" else [f"--{flag}"]
        group.add_argument(*names, action="store_true", help=about, default=argparse.SUPPRESS)
    return parser


def split_words(parser: Parser, words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Returns the program's own flags, none of which is required, and the words that are the config's.

    Args:
        parser: the program's flags; see `own_flags`.
        words: the command line; None: this process's own.

    Raises:
        UserError: a flag of the program is wrong, or given twice.
        SystemExit: with code 0, after --help has printed.
    """
    flags = names_of(parser.parse_args([]))
    options = split_options(sys.argv[1:] if words is None else words)
    if any(option.is_help for option in options):
        print(parser.format_help(), end="")
        raise SystemExit(0)
    check_once(options)
    own = _parsed(parser, words_of([option for option in options if option.key in flags]))
    return own, words_of([option for option in options if option.key not in flags])
