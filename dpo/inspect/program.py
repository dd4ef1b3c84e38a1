"""Shows the data of a run as the trainer sees it: counts, drops, lengths, ends, repeats, length bias, examples.

    python -m dpo.inspect --config FILE [--SECTION.KEY VALUE ...] [--html FILE] [--examples N]

Needs no GPU and no weights: of a hub model only config and tokenizer are downloaded. The data is read by the trainer's
own code, and the trainer reuses the cache of tokenized rows.
"""

import sys
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from dpo.base.files import write_file
from dpo.config import Config
from dpo.encode.tokenizer import has_tokenizer, load_tokenizer
from dpo.inspect.arguments import read_arguments
from dpo.inspect.inspection import Inspection, inspect_data
from dpo.inspect.page import html_page
from dpo.inspect.terminal import make_console, print_inspection
from dpo.model.download import find_model_config
from dpo.pairs.prepare import PreferenceData, prepare_data
from dpo.pairs.report import check_enough
from dpo.sources.formats.examples import holds_ids
from dpo.terminal.console import is_quiet, say


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
    arguments = read_arguments()
    if is_quiet() or not sys.stderr.isatty():
        disable_progress_bars()
    inspection = inspect(arguments.config, arguments.examples)
    if arguments.html:
        write_file(arguments.html, html_page(inspection).encode())
        say(f"the page is in {arguments.html}")
    print_inspection(inspection, make_console())
