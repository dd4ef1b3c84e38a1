"""The command line of `python -m dpo.score`. Without torch, so that a wrong word is answered at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpo.base.errors import UserError
from dpo.command.line import Parser, names_of, own_flags, split_words
from dpo.config import Config, load_config

DESCRIPTION = """Scores a model on preference pairs, against the config's reference: its model.path where reference.path
is null."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    config: Config
    by_source: bool
    as_json: bool


def make_parser(prog: str = "python -m dpo.score") -> Parser:
    """Returns the parser of the program's own flags."""
    parser = own_flags(prog, DESCRIPTION, "--model runs/my/final")
    parser.add_argument("--model", metavar="DIR", help="folder or hub id of the model to score; required")
    about = "also score the pairs of each source separately, in another pass"
    parser.add_argument("--by-source", action="store_true", help=about)
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return parser


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> Arguments:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help and --print_config.
    """
    own, rest = split_words(parser or make_parser(), words)
    config = load_config(rest, "dpo.score", own=names_of(own))
    if own.model is None:
        raise UserError("command line: --model", "is missing", "--model DIR, the folder or hub id of a model")
    return Arguments(with_model(config, own.model), own.by_source, own.json)


def with_model(config: Config, model: str) -> Config:
    """Returns the config with `model` as model.path, and its present tokenizer and reference.

    All ranks shard one copy of the model. `pairs_per_step` is 1, so that any number of pairs is enough.
    """
    reference = config.reference.path or config.model.path
    return replace(
        config,
        model=replace(config.model, path=model, tokenizer=config.model.tokenizer or config.model.path),
        reference=replace(config.reference, path=reference if config.loss.facts.uses_reference else None),
        batch=replace(config.batch, pairs_per_step=1),
        parallel=replace(config.parallel, shard=None, replicate=1),
    )
