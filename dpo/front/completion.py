"""Tab completion: `dpo completion bash` prints a script of shtab for bash, zsh or tcsh.

It completes the names of programs, their flags, the keys of the config, the shipped configs, and files.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

import shtab

from dpo.base.command import SWITCHES, Parser, parse_arguments, run_program
from dpo.config.keys import KEYS
from dpo.front.configs import named_configs
from dpo.front.names import COMMANDS, FLAGS, Command
from dpo.front.ranks import add_ranks

DESCRIPTION = """Prints a script that completes words of dpo in a shell. To switch it on in bash, add to ~/.bashrc:
eval "$(dpo completion bash)"."""


def make_parser() -> Parser:
    """Returns a parser with a subcommand for each program: it describes the words, and reads none."""
    parser = Parser("dpo")
    programs = parser.add_subparsers()
    for name, command in COMMANDS.items():
        program = programs.add_parser(name, help=command.about)
        _add_flags(program, name, command)
        if name in CHOICES:
            program.add_argument("name", choices=CHOICES[name]())
    return parser


CHOICES: Mapping[str, Callable[[], Sequence[str]]] = {
    "configs": lambda: list(named_configs()),
    "completion": lambda: shtab.SUPPORTED_SHELLS,
}
"""Name of a program -> its single words that are not flags."""


def _add_flags(parser: Parser, name: str, command: Command) -> None:
    """Adds the flags of a program to its parser."""
    for flag in FLAGS.get(name, "").split():
        parser.add_argument(flag).complete = shtab.FILE  # type: ignore[attr-defined]
    if command.starts_ranks:
        add_ranks(parser)
    if command.has_config:
        _add_config(parser)


def _add_config(parser: Parser) -> None:
    parser.add_argument("--config").complete = shtab.FILE  # type: ignore[attr-defined]
    for flag in sorted(SWITCHES.keys() - {"help"}):
        parser.add_argument(f"--{flag}", action="store_true")
    for key in sorted(KEYS):
        parser.add_argument(f"--{key}")
    parser.add_argument("words", nargs="*").complete = shtab.FILE  # type: ignore[attr-defined]


def main() -> None:
    """Runs `dpo completion`."""
    parser = Parser("dpo completion", description=DESCRIPTION)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    print(shtab.complete(make_parser(), parse_arguments(parser).shell))


if __name__ == "__main__":
    sys.exit(run_program(main))
