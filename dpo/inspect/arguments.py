"""The command line of `python -m dpo.inspect`. Without torch, so that a wrong word is answered at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import UserError
from dpo.command.line import Parser, names_of, own_flags, split_words
from dpo.config import Config, load_config

DESCRIPTION = "Shows the data of a run as the trainer sees it; needs no GPU and no weights."
DEFAULT_EXAMPLES = 3


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    config: Config
    html: Path | None
    examples: int


def make_parser(prog: str = "python -m dpo.inspect") -> Parser:
    """Returns the parser of the program's own flags."""
    parser = own_flags(prog, DESCRIPTION, "--html data.html")
    about = "also write everything as one HTML page (default: the terminal alone)"
    parser.add_argument("--html", type=Path, metavar="FILE", help=about)
    about = f"number of pairs of step 1 to show, token by token (default: {DEFAULT_EXAMPLES})"
    parser.add_argument("--examples", type=int, metavar="N", default=DEFAULT_EXAMPLES, help=about)
    return parser


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> Arguments:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help and --print_config.
    """
    own, rest = split_words(parser or make_parser(), words)
    config = load_config(rest, "dpo.inspect", own=names_of(own))
    if own.examples < 0:
        raise UserError("command line: --examples", f"must be >= 0, got {own.examples}", "an integer >= 0")
    if own.html is not None and (own.html.is_dir() or not own.html.parent.is_dir()):
        raise UserError("command line: --html", f"cannot be written: {own.html}", "a file in a folder that exists")
    return Arguments(config, own.html, own.examples)
