"""The ranks that a command line of `dpo train`, `dpo replay`, `dpo reference` or `dpo doctor` asks for. Without torch.

--gpus N     N ranks with a GPU each
--ranks N    N ranks on CPUs
neither      a rank for each visible GPU; without GPUs one rank on the CPU
"""

import os
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass

from dpo.base.errors import UserError
from dpo.base.units import shown_bytes
from dpo.command.line import COMMAND_LINE, Parser, split_options, split_words
from dpo.terminal.console import warn

BYTES_OF_A_RANK = 300 * 2**20
"""The memory of a rank that has imported torch and transformers, and holds no model: 303 MiB of private pages measured
with torch 2.13 for CPUs."""


@dataclass(frozen=True)
class Wanted:
    """The ranks that the user asked for."""

    gpus: int | None
    """Ranks with a GPU each; None: not given."""
    ranks: int | None
    """Ranks on CPUs; None: not given."""


def add_ranks(parser: Parser) -> None:
    """Adds --gpus and --ranks to the parser of a program."""
    about = "ranks with a GPU each, which this command starts (default: all visible GPUs, without GPUs 1 rank)"
    parser.add_argument("--gpus", type=_count, metavar="N", help=about)
    parser.add_argument("--ranks", type=_count, metavar="N", help="ranks on CPUs (default: none)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not an integer from 1 on")
    return int(text)


def read_wanted(parser: Parser, words: Sequence[str]) -> tuple[Wanted, list[str]]:
    """Returns the ranks that the words ask for, and the other words.

    Args:
        parser: of the program, with the flags of `add_ranks`.
        words: the command line.

    Raises:
        UserError: a flag of the program is wrong.
        SystemExit: with code 0, after --help has printed.
    """
    if any(option.is_help for option in split_options(words)):
        print(parser.format_help(), end="")
        raise SystemExit(0)
    alone = Parser(parser.prog, add_help=False, allow_abbrev=False)  # the program's own parser may require words
    add_ranks(alone)
    own, rest = split_words(alone, words)
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


def check_host(size: int, available: int) -> None:
    """Raises UserError where the ranks of --ranks do not fit in the memory of this machine even without a model; warns
    where several share a CPU.

    Args:
        size: the number of ranks on CPUs.
        available: the memory in bytes that processes can still take.
    """
    if size * BYTES_OF_A_RANK > available:
        needed = f"{size} ranks need {shown_bytes(size * BYTES_OF_A_RANK)} before they load a model"
        what = f"{needed}, and {shown_bytes(available)} are available"
        raise UserError(f"{COMMAND_LINE}: --ranks", what, f"up to {max(1, available // BYTES_OF_A_RANK)}")
    num_cpus = len(os.sched_getaffinity(0))
    if size > num_cpus:
        warn(f"{size} ranks share {num_cpus} CPUs: more ranks make this run slower, not faster")
