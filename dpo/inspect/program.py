"""Shows the data of a run as the trainer sees it: counts, drops, lengths, ends, repeats, length bias, examples.

    python -m dpo.inspect --config FILE [--SECTION.KEY VALUE ...] [--html FILE] [--examples N]

Needs no GPU and no weights: of a hub model only config and tokenizer are downloaded. The data is read by the trainer's
own code, and the trainer reuses the cache of tokenized rows.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from dpo.base.command import names_of, own_flags, split_words
from dpo.base.console import is_quiet, say
from dpo.base.errors import UserError
from dpo.config import Config, load_config
from dpo.data.formats.examples import holds_ids
from dpo.data.prepare import PreferenceData, prepare_data
from dpo.data.report import check_enough
from dpo.data.tokenizer import has_tokenizer, load_tokenizer
from dpo.inspect.inspection import Inspection, inspect_data
from dpo.inspect.page import html_page
from dpo.inspect.terminal import make_console, print_inspection
from dpo.model.download import find_model_config

DESCRIPTION = "Shows the data of a run as the trainer sees it; needs no GPU and no weights."
DEFAULT_EXAMPLES = 3


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    config: Config
    html: Path | None
    examples: int


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Returns the arguments of the command line. Raises UserError where they are wrong; --help and --print_config print
    and raise SystemExit(0).
    """
    parser = own_flags("python -m dpo.inspect", DESCRIPTION, "--html data.html")
    about = "also write everything as one HTML page (default: the terminal alone)"
    parser.add_argument("--html", type=Path, metavar="FILE", help=about)
    about = f"number of pairs of step 1 to show, token by token (default: {DEFAULT_EXAMPLES})"
    parser.add_argument("--examples", type=int, metavar="N", default=DEFAULT_EXAMPLES, help=about)
    own, rest = split_words(parser, argv)
    config = load_config(rest, "dpo.inspect", own=names_of(own))
    if own.examples < 0:
        raise UserError("command line: --examples", f"must be >= 0, got {own.examples}", "an integer >= 0")
    if own.html is not None and (own.html.is_dir() or not own.html.parent.is_dir()):
        raise UserError("command line: --html", f"cannot be written: {own.html}", "a file in a folder that exists")
    return Arguments(config, own.html, own.examples)


def inspect(config: Config, num_examples: int) -> Inspection:
    """Reads, tokenizes and counts all data of a run, and returns the inspection."""
    model_config = find_model_config(config)
    say("data: reading, and tokenizing rows that are not in the cache")
    data = prepare_data(config, model_config)
    check_enough(data.report, config.batch.pairs_per_step, say)
    return inspect_data(config, model_config, find_tokenizer(config, data), data, num_examples)


def find_tokenizer(config: Config, data: PreferenceData) -> Any:
    """Returns the tokenizer of the data; None where all data came as tokens, the config names no tokenizer and the
    model's folder has none.
    """
    path = config.model.tokenizer or config.model.path
    is_needed = not all(holds_ids(source.format) for source in data.report.sources)
    if not (is_needed or config.model.tokenizer or has_tokenizer(Path(path))):
        return None
    return load_tokenizer(path, config.model.trust_remote_code)


def main() -> None:
    """Runs `python -m dpo.inspect`."""
    arguments = read_arguments(sys.argv[1:])
    if is_quiet() or not sys.stderr.isatty():
        disable_progress_bars()
    inspection = inspect(arguments.config, arguments.examples)
    if arguments.html:
        arguments.html.write_text(html_page(inspection), encoding="utf-8")
        say(f"the page is in {arguments.html}")
    print_inspection(inspection, make_console())
