"""The command line of `python -m dpo.export`. Without torch, so that a wrong word is answered at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpo.base.errors import UserError
from dpo.command.line import Parser, parse_arguments, with_quiet

DESCRIPTION = """Exports the policy of a checkpoint as a Hugging Face folder, as a run does with its last policy in
`final/`. A run folder stands for its newest checkpoint. The exported folder loads with plain
`AutoModelForCausalLM.from_pretrained`. A run with adapters exports these alone, in peft's form; with --merge it exports
a whole model, to whose weights they are added in float32. --adapter does so with any folder of adapters. Under torchrun
the model is sharded over the ranks, and each rank loads and writes its shards."""


def make_parser(prog: str = "python -m dpo.export") -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(prog, description=DESCRIPTION, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    about = "RUN/checkpoints/step-000100; RUN: its newest"
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help=about)
    about = "a folder of adapters in peft's form, such as RUN/final; with --merge"
    what.add_argument("--adapter", type=Path, metavar="DIR", help=about)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="a new or an empty folder; required")
    about = "add the adapters to the weights of their base, and export a whole model"
    parser.add_argument("--merge", action="store_true", help=about)
    about = "folder or hub id of the model that --adapter is for (default: the one that its adapter_config.json names)"
    parser.add_argument("--base", metavar="MODEL", help=about)
    about = "data type of the parameters (default: the run's checkpoint.export_dtype; auto with --adapter)"
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], help=about)
    about = "run the code of the model's own repository; of a checkpoint, where the run's config does so too"
    parser.add_argument("--trust-remote-code", action="store_true", help=about)
    return with_quiet(parser)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help.
    """
    args = parse_arguments(parser or make_parser(), words)
    if args.adapter and not args.merge:
        raise UserError("command line: --adapter", f"{args.adapter} holds adapters already", "with --merge")
    if args.base and not args.adapter:
        raise UserError("command line: --base", "the config of a checkpoint names its model", "with --adapter")
    return args
