"""The command line of `python -m dpo.push`. Without torch, so that a wrong word is answered at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpo.command.line import Parser, parse_arguments, with_quiet

DESCRIPTION = """Uploads the trained model or adapters of a run, or any such folder, to the Hugging Face hub. The
repository and the branch are made where they do not exist. The token is that of HF_TOKEN or of `hf auth login`, with
the right to write. Nothing is removed from the repository; files of the same names are replaced."""


def make_parser(prog: str = "python -m dpo.push") -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(prog, description=DESCRIPTION, allow_abbrev=False)
    about = "a run folder with final/, or the folder of a model or of adapters"
    parser.add_argument("run", metavar="RUN", type=Path, help=about)
    parser.add_argument("repo", metavar="REPO", help="ORG/NAME; NAME alone is one of your own")
    parser.add_argument("--private", action="store_true", help="a new repository is seen by its owners alone")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to upload to (default: main)")
    return with_quiet(parser)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help.
    """
    return parse_arguments(parser or make_parser(), words)
