"""The command line of `python -m dpo.replay`. Without torch, so that a wrong word is answered at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpo.command.line import Parser, parse_arguments, with_quiet

DESCRIPTION = """Computes the steps of a run again, from its newest checkpoint before --step to --step, and compares
their metrics with metrics.jsonl, and the weights with the checkpoint after --step where there is one: bitwise on the
layout of the run, else the losses to 1e-5. Writes nothing into the run folder. Exit code 0: equal; 1: a step differs.
Needs the run's model, data and working directory as they were."""


def make_parser(prog: str = "python -m dpo.replay") -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(prog, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--step", type=_step, required=True, metavar="N", help="the last step to compute; required")
    about = "run the code of the model's own repository, where the run's config does so too"
    parser.add_argument("--trust-remote-code", action="store_true", help=about)
    return with_quiet(parser)


def _step(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 on")
    return int(text)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help.
    """
    return parse_arguments(parser or make_parser(), words)
