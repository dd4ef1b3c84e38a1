"""The ranks that a command line of `dpo train`, `dpo reference` or `dpo doctor` asks for. Without torch.

--gpus N     N ranks with a GPU each
--ranks N    N ranks on CPUs
neither      a rank for each visible GPU; without GPUs one rank on the CPU
"""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass

from dpo.base.command import COMMAND_LINE, Parser, own_flags, split_words
from dpo.base.errors import UserError


@dataclass(frozen=True)
class Wanted:
    """The ranks that the user asked for."""

    gpus: int | None
    """Ranks with a GPU each; None: not given."""
    ranks: int | None
    """Ranks on CPUs; None: not given."""


def make_parser(name: str) -> Parser:
    """Returns the parser of --gpus and --ranks."""
    parser = own_flags(f"dpo {name}")
    add_ranks(parser)
    return parser


def help_of_ranks(name: str) -> str:
    """Returns the text on --gpus and --ranks, which stands above the help of the program itself."""
    usage = f"dpo {name} [CONFIG.yaml] [--gpus N | --ranks N] [SECTION.KEY=VALUE ...]"
    parser = Parser(f"dpo {name}", usage=usage, add_help=False)
    add_ranks(parser)
    return parser.format_help()


def add_ranks(parser: Parser) -> None:
    """Adds --gpus and --ranks to a parser."""
    group = parser.add_argument_group("ranks, which this command starts itself")
    group.add_argument(
        "--gpus",
        type=_count,
        metavar="N",
        help="ranks with a GPU each (default: all visible GPUs, without GPUs 1 rank)",
    )
    group.add_argument("--ranks", type=_count, metavar="N", help="ranks on CPUs")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not an integer from 1 on")
    return int(text)


def read_wanted(parser: Parser, words: Sequence[str]) -> tuple[Wanted, list[str]]:
    """Returns the ranks that the words ask for, and the other words. Raises UserError."""
    own, rest = split_words(parser, words)
    if own.gpus and own.ranks:
        raise UserError(f"{COMMAND_LINE}: --ranks", "is for ranks on CPUs", "--gpus N alone, or --ranks N alone")
    return Wanted(own.gpus, own.ranks), rest


def number_of_ranks(wanted: Wanted, visible: int, why_none: str) -> int:
    """Returns how many ranks to start.

    Args:
        wanted: the command line's.
        visible: the GPUs that torch finds.
        why_none: why it finds none, for the error.

    Raises UserError where fewer GPUs are visible than asked for.
    """
    if wanted.ranks:
        return wanted.ranks
    if wanted.gpus and wanted.gpus > visible:
        found = f"finds {visible}" if visible else f"finds none: {why_none}"
        valid = f"up to {visible}" if visible else "a CUDA build of torch on a node with GPUs, or --ranks N on CPUs"
        raise UserError(f"{COMMAND_LINE}: --gpus", f"{wanted.gpus} asked for, and torch {found}", valid)
    return wanted.gpus or visible or 1
