"""The command line of the training program. Without torch, so that a wrong word is answered at once."""

from collections.abc import Sequence

from dpo.command.line import Parser, names_of, own_flags, split_words
from dpo.config import Config, load_config

DESCRIPTION = """Trains a model by Direct Preference Optimization. On one node with eight GPUs: dpo train FILE.yaml
--gpus 8, or torchrun --standalone --nproc-per-node 8 -m dpo.train --config FILE.yaml. Without torchrun, python -m
dpo.train runs on one rank."""


def make_parser(prog: str = "python -m dpo.train") -> Parser:
    """Returns the parser of the flags that are no keys of the config."""
    return own_flags(prog, DESCRIPTION)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> Config:
    """Returns the config in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help and --print_config.
    """
    own, rest = split_words(parser or make_parser(), words)
    return load_config(rest, "dpo.train", own=names_of(own))
