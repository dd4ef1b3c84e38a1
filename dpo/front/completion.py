"""Tab completion: `dpo completion bash` prints a script of shtab for bash, zsh or tcsh.

It completes the names of programs, their flags, the keys of the config, the shipped configs, and files.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import shtab

from dpo.command.exits import run_program
from dpo.command.line import Parser, parse_arguments, with_quiet
from dpo.config.keys import KEYS
from dpo.front.configs import named_configs
from dpo.front.names import COMMANDS, Command
from dpo.front.ranks import add_ranks

DESCRIPTION = """Prints a script that completes words of dpo in a shell. To switch it on in bash, add to ~/.bashrc:
eval "$(dpo completion bash)"."""

FILES = ("FILE", "FILE.yaml", "DIR", "OUT", "RUN", "IMAGE")
"""The metavars of arguments that name files or folders."""


def parser_of_dpo() -> Parser:
    """Returns a parser with a subcommand for each program: it describes the words, and reads none."""
    parser = Parser("dpo")
    parser.add_argument("--version", action="store_true")
    programs = parser.add_subparsers()
    for name, command in COMMANDS.items():
        parents = [parser_of(name, command)]
        programs.add_parser(name, help=command.about, parents=parents, add_help=False, conflict_handler="resolve")
    return parser


def parser_of(name: str, command: Command) -> Parser:
    """Returns the parser of a program, with the keys of the config where it takes them."""
    parser: Parser = import_module(command.reader).make_parser(f"dpo {name}")
    if command.starts_ranks:
        add_ranks(parser)
    if command.has_config:
        for key in sorted(KEYS):
            parser.add_argument(f"--{key}")
        parser.add_argument("words", nargs="*", metavar="FILE.yaml")
    for action in parser._actions:  # argparse has no public list of them; shtab reads the same
        _complete(name, action)
    return parser


def _complete(name: str, action: argparse.Action) -> None:
    """Tells shtab the values of an argument: files, or the shipped configs."""
    if action.metavar in FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    if (name, action.dest) == ("configs", "name"):
        action.choices = list(named_configs())


def make_parser(prog: str = "dpo completion") -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(prog, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return with_quiet(parser)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help.
    """
    return parse_arguments(parser or make_parser(), words)


def main() -> None:
    """Runs `dpo completion`."""
    print(shtab.complete(parser_of_dpo(), read_arguments().shell))


if __name__ == "__main__":
    sys.exit(run_program(main))
