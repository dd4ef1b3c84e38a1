"""The command line of `python -m dpo.sample`. Without torch, so that a wrong word is answered at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpo.base.errors import UserError
from dpo.command.line import Parser, parse_arguments, with_quiet

DESCRIPTION = """Generates answers of a model to any prompts, beside the answers of another model.

FILE is a .txt file with one prompt per line, which the model reads as it is (blank lines are skipped); or JSON or JSONL
with rows {"prompt": TEXT} or {"prompt": [{"role": "user", "content": TEXT}, ...]}, whose messages go through the chat
template as in training, with `system`, `tools` and `chat_template_kwargs` of the row. With --as-chat each text is a
user's message, as with `as_chat: true` in training. Under torchrun each model is sharded over the ranks.

LoRA adapters, with adapter_config.json, are a model: these on their base. So is the folder of a run: that
which it has trained.
"""


def make_parser(prog: str = "python -m dpo.sample") -> Parser:
    """Returns the parser of the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog, description=DESCRIPTION, formatter_class=form, allow_abbrev=False)
    about = "folder or hub id of the model or of LoRA adapters, or folder of a run; required"
    parser.add_argument("--model", required=True, metavar="DIR", help=about)
    parser.add_argument("--reference", metavar="DIR", help="a second model, to compare with (default: none)")
    parser.add_argument("--tokenizer", metavar="DIR", help="its folder or hub id (default: that of each model)")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="the file of prompts; required")
    about = "maximum tokens per answer (default: 128)"
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help=about)
    parser.add_argument("--as-chat", action="store_true", help="texts are a user's messages, for the chat template")
    about = "0: greedy, always the most likely token; above 0: sampling (default: 0)"
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help=about)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    parser.add_argument("--json", action="store_true", help='JSON lines: {"prompt", "policy", "reference"}')
    return with_quiet(parser)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help.
    """
    args = parse_arguments(parser or make_parser(), words)
    if args.max_new_tokens < 1:
        raise UserError("command line: --max-new-tokens", f"must be >= 1, got {args.max_new_tokens}", "an integer >= 1")
    if not 0 <= args.temperature < float("inf"):
        raise UserError("command line: --temperature", f"must be >= 0, got {args.temperature}", "a number >= 0")
    return args
