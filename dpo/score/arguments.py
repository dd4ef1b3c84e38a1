"""The command line of `python -m dpo.score`. Without torch, so that a wrong word is answered at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpo.adapters.base import NamedModel, name_model
from dpo.base.errors import UserError
from dpo.command.line import Parser, names_of, own_flags, split_words
from dpo.config import Config, LoraConfig, load_config

DESCRIPTION = """Scores a model on preference pairs, against the config's reference: its model.path where reference.path
is null. The model is a whole one, or LoRA adapters with their base."""
MODEL, ADAPTER = "command line: --model", "command line: --adapter"


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    config: Config
    """As `with_model` returns it."""
    reference_adapter: str | None
    """Folder or hub id of the adapters of the reference; None: it has none."""
    by_source: bool
    as_json: bool
    adapter_place: str
    """The flag that gave `config.lora.path`."""


def make_parser(prog: str = "python -m dpo.score") -> Parser:
    """Returns the parser of the program's own flags."""
    parser = own_flags(prog, DESCRIPTION, "--model runs/my/final")
    about = "folder or hub id of the model to score, or of its adapters; required without --adapter"
    parser.add_argument("--model", metavar="DIR", help=about)
    about = "folder or hub id of LoRA adapters of --model, or of the config's model.path (default: none)"
    parser.add_argument("--adapter", metavar="DIR", help=about)
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
    model = _named(config, own.model, own.adapter)
    place = ADAPTER if own.adapter else MODEL
    return Arguments(with_model(config, model), reference_adapter(config), own.by_source, own.json, place)


def _named(config: Config, model: str | None, adapter: str | None) -> NamedModel:
    """Returns the model to score. Raises UserError where the flags name none, or two adapters."""
    if model is None and adapter is None:
        raise UserError(MODEL, "is missing", "--model DIR, the folder or hub id of a model")
    named = name_model(model, MODEL) if model else NamedModel(config.model.path)
    if named.adapters and adapter:
        raise UserError(ADAPTER, f"--model {model} has adapters already", "--model with their base, or one of the two")
    return NamedModel(named.base, adapter) if adapter else named


def reference_adapter(config: Config) -> str | None:
    """Returns the folder or hub id of the adapters with which a run of this config has its reference; None where its
    reference is a whole model.
    """
    is_start = config.reference.path is None and config.reference.adapter == "start"
    return config.lora.path if is_start and config.loss.facts.uses_reference else None


def with_model(config: Config, model: NamedModel) -> Config:
    """Returns the config with `model` as model.path and lora.path, its present tokenizer, and as the reference the
    whole model that its present reference is or has adapters for.

    All ranks shard one copy of the model. `pairs_per_step` is 1, so that any number of pairs is enough.
    """
    reference = config.reference.path or config.model.path if config.loss.facts.uses_reference else None
    return replace(
        config,
        model=replace(config.model, path=model.base, tokenizer=config.model.tokenizer or config.model.path),
        lora=LoraConfig(path=model.adapters),
        reference=replace(config.reference, path=reference, adapter="base"),
        batch=replace(config.batch, pairs_per_step=1),
        parallel=replace(config.parallel, shard=None, replicate=1),
    )
