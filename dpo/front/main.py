"""`dpo NAME WORDS`: the same as `python -m MODULE WORDS`, where some programs start their ranks themselves."""

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from dpo import DISTRIBUTION
from dpo.base.errors import UserError
from dpo.command.exits import run_program, slow_imports
from dpo.command.likeness import closest, meant
from dpo.command.line import COMMAND_LINE, Parser
from dpo.command.rank import is_rank
from dpo.front.names import COMMANDS, Command, help_text
from dpo.front.ranks import add_ranks, read_wanted
from dpo.machine.job import check_one_node, check_tasks
from dpo.run_folder.files import LOG
from dpo.terminal.console import unsaid


def main() -> None:
    """Runs `dpo NAME WORDS`, and ends this process with the exit code of the program."""
    name, words = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    code = run_program(partial(answer, name, words))
    if code == 0 and name in COMMANDS:
        run_module(COMMANDS[name].module, words)
    sys.exit(code)


def answer(name: str, words: Sequence[str]) -> None:
    """Answers what needs no program of its own, before torch is imported: --help and --version, an unknown name, wrong
    words of a program, and a program whose ranks `dpo` starts. Returns where `run_module` is to run the program.

    Raises:
        UserError: for an unknown name, and for wrong words.
        SystemExit: with the exit code of the command.
    """
    if name in TEXTS:
        print(TEXTS[name]())
        raise SystemExit(0)
    command = COMMANDS.get(name)
    if command is None:
        raise UserError(
            f"{COMMAND_LINE}: {name}", f"no such program{meant(closest(name, COMMANDS))}", ", ".join(COMMANDS)
        )
    if is_rank(os.environ):  # a rank of torchrun, which reads its words together with the others
        return
    reader = import_module(command.reader)
    parser = reader.make_parser(f"dpo {name}")
    if command.starts_ranks:
        run_ranks_of(command, words, reader, parser)
    reader.read_arguments(words, parser)


def installed_version() -> str:
    """Returns the version of this package, as it is installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed: a checkout, without a version"


TEXTS: Mapping[str, Callable[[], str]] = {"--help": help_text, "-h": help_text, "--version": installed_version}
"""Flags in the place of a name -> the text that they print."""


def run_ranks_of(command: Command, words: Sequence[str], reader: ModuleType, parser: Parser) -> NoReturn:
    """Checks the command line, then starts the ranks of a program and waits for them.

    Args:
        command: the program.
        words: its command line.
        reader: the module that reads the command line.
        parser: of this module.

    Raises:
        UserError: where the command line is wrong.
        SystemExit: with the exit code of the program, or with 0 after --help and the like.
    """
    add_ranks(parser)
    wanted, rest = read_wanted(parser, words)
    check_tasks(os.environ)
    check_one_node(os.environ)
    with unsaid():  # rank 0 reads the same words
        arguments = reader.read_arguments(rest, parser)
    log = Path(str(arguments.train.run_dir), LOG) if command.has_log else None
    with slow_imports():
        from dpo.front.parent import run_ranks

    raise SystemExit(run_ranks(command, tuple(rest), wanted, log))


def run_module(module: str, words: Sequence[str]) -> None:
    """Runs a module in this process, as `python -m` does."""
    sys.argv = [module, *words]
    sys.modules.pop(module, None)  # runpy warns of a module that is imported, as some are to read their words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
