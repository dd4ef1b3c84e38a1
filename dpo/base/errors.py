"""The ways in which a program of this package ends early; `dpo.distributed.program` turns them into exit codes."""

import argparse
from collections.abc import Sequence
from typing import NoReturn


class UserError(ValueError):
    """The user's input is wrong: exit code 2.

    The message is one line that says where (`FILE or command line: KEY`, or `file:line`), what, and what would be
    right.
    """


class RunError(RuntimeError):
    """Something was found while running (a gradient that is not finite, a failed self-check): exit code 1."""


class Preempted(Exception):
    """The run was asked to stop and has saved what it had, after `step` updates: exit code 0."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; the same command goes on from here")
        self.step = step


def parse_arguments(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments in `words` (null: this process's own), --quiet among them; wrong ones are a UserError in one line,
    as everywhere.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"command line: {message}; valid: see {parser.prog} --help")

    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument(
        "--quiet", action="store_true", help="leave out what tells of the progress; results, warnings and errors stay"
    )
    return parser.parse_args(words)


def own_flags(prog: str) -> argparse.ArgumentParser:
    """A parser for the flags that a program has beside the config's keys; see `split_words`."""
    return argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False, exit_on_error=False)


def split_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The program's own flags, and the words that are the config's. Raises UserError."""
    try:
        return parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"command line: {error}; valid: see {parser.prog} --help") from error
