"""The command line of `python -m dpo.export`. Without torch, so that a wrong word is answered at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpo.command.line import Parser, parse_arguments, with_quiet

DESCRIPTION = """Exports the policy of a checkpoint as a Hugging Face folder, as a run does with its last policy in
`final/`. A run folder stands for its newest checkpoint. The exported folder loads with plain
`AutoModelForCausalLM.from_pretrained`. Under torchrun the model is sharded over the ranks, and each rank loads and
writes its shards."""


def make_parser(prog: str = "python -m dpo.export") -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(prog, description=DESCRIPTION, allow_abbrev=False)
    about = "RUN/checkpoints/step-000100; RUN: its newest; required"
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", required=True, help=about)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="a new or an empty folder; required")
    about = "data type of the parameters (default: the run's checkpoint.export_dtype)"
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], help=about)
    about = "run the code of the model's own repository, where the run's config does so too"
    parser.add_argument("--trust-remote-code", action="store_true", help=about)
    return with_quiet(parser)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help.
    """
    return parse_arguments(parser or make_parser(), words)
