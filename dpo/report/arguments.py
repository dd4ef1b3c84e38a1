"""The command line of `python -m dpo.report`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpo.command.line import Parser, parse_arguments, with_quiet

DESCRIPTION = """Writes a run as one HTML page: curves, rewards, why they fall, length bias, calibration, answers, cost;
several runs side by side, a sweep over one or two keys as a heat map. Works while a run is going on, too."""


def make_parser(prog: str = "python -m dpo.report") -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(prog, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder; runs/sweep/* names many")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page (default: RUN/report.html, or report.html)")
    parser.add_argument("--metric", metavar="NAME", help="the heat map's metric, such as eval/loss")
    return with_quiet(parser)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help.
    """
    return parse_arguments(parser or make_parser(), words)
