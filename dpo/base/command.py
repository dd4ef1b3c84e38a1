"""Command lines: arguments in one line of error, a program's own flags beside the config's keys."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from dpo.base.errors import UserError


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
