"""The command line of `python -m dpo.demo`. Without torch, so that a wrong word is answered at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpo.command.line import Parser, parse_arguments, with_quiet

DESCRIPTION = """A small policy learns a preference on two processes, in minutes; the demo generates its data and model.
All files lie in one folder, which the next demo with the same DIR replaces."""


def make_parser(prog: str = "python -m dpo.demo") -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(prog, description=DESCRIPTION, allow_abbrev=False)
    about = "the demo's folder (default: runs/demo)"
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help=about)
    return with_quiet(parser)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help.
    """
    return parse_arguments(parser or make_parser(), words)
