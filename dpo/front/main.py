"""`dpo NAME WORDS`: the same as `python -m MODULE WORDS`, where some programs start their ranks themselves."""

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dpo import DISTRIBUTION
from dpo.base.command import COMMAND_LINE, closest, meant, run_program, split_options
from dpo.base.errors import UserError
from dpo.config import load_config
from dpo.front.names import COMMANDS, FLAGS, Command, help_text
from dpo.front.ranks import help_of_ranks, make_parser, read_wanted
from dpo.machine.job import check_one_node, check_tasks, is_rank
from dpo.run.files import LOG


def main() -> None:
    """Runs `dpo NAME WORDS`, and ends this process with the exit code of the program."""
    name, words = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    code = run_program(partial(answer, name, words))
    if code == 0 and name in COMMANDS:
        run_module(COMMANDS[name].module, words)
    sys.exit(code)


def answer(name: str, words: Sequence[str]) -> None:
    """Answers what needs no program of its own: --help, --version, an unknown name, and a program whose ranks `dpo`
    starts.

    Raises:
        UserError: for an unknown name.
        SystemExit: with the exit code of the command, unless `run_module` is to run it.
    """
    if name in TEXTS:
        print(TEXTS[name]())
        raise SystemExit(0)
    command = COMMANDS.get(name)
    if command is None:
        raise UserError(
            f"{COMMAND_LINE}: {name}", f"no such program{meant(closest(name, COMMANDS))}", ", ".join(COMMANDS)
        )
    if starts_ranks(command):
        run_ranks_of(name, command, words)


def installed_version() -> str:
    """Returns the version of this package, as it is installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed: a checkout, without a version"


TEXTS: Mapping[str, Callable[[], str]] = {"--help": help_text, "-h": help_text, "--version": installed_version}
"""Flags in the place of a name -> the text that they print."""


def run_ranks_of(name: str, command: Command, words: Sequence[str]) -> None:
    """Checks the command line, then starts the ranks of a program and waits for them. Returns after --help.

    Raises:
        UserError: where the command line is wrong.
        SystemExit: with the exit code of the program.
    """
    if any(option.words in (("--help",), ("-h",)) for option in split_options(words)):
        print(help_of_ranks(name), flush=True)
        return
    wanted, rest = read_wanted(make_parser(name), words)
    check_tasks(os.environ)
    check_one_node(os.environ)
    log = None
    if name not in FLAGS:  # all words are the config's
        config = load_config(rest, prog=command.module, own=("gpus", "ranks"))
        log = Path(str(config.train.run_dir), LOG) if command.has_log else None
    from dpo.front.parent import run_ranks  # imports torch

    raise SystemExit(run_ranks(command, tuple(rest), wanted, log))


def starts_ranks(command: Command) -> bool:
    """Returns whether this process starts the ranks of a program: not where it is a rank of torchrun itself."""
    return command.starts_ranks and not is_rank(os.environ)


def run_module(module: str, words: Sequence[str]) -> None:
    """Runs a module in this process, as `python -m` does."""
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
