"""The command line of stub.py: any words."""

from collections.abc import Sequence

from dpo.command.line import Parser, own_flags


def make_parser(prog: str) -> Parser:
    """The parser of the flags that every program has."""
    return own_flags(prog)


def read_arguments(words: Sequence[str], parser: Parser) -> None:
    """Accepts all."""
