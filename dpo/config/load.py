"""From a YAML file and a command line to a checked Config, and back: `load_config`, `to_yaml`.

Defaults < the file of --config < --SECTION.KEY on the command line. The fields are in `config_fields`.
"""

import dataclasses
import inspect
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, set_parsing_settings

from dpo.base.command import COMMAND_LINE, QUIET, split_options
from dpo.base.errors import UserError
from dpo.config.fields import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ReferenceConfig,
    SourceConfig,
    TrainConfig,
)
from dpo.config.reading import (
    Given,
    describe,
    options_of_file,
    options_of_texts,
    required_keys,
    split_command_line,
)
from dpo.config.rules import validate
from dpo.config.strict_yaml import dump_yaml

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ReferenceConfig",
    "SourceConfig",
    "TrainConfig",
    "load_config",
    "to_yaml",
    "validate",
    "with_place",
]

SECTIONS: Mapping[str, type] = get_type_hints(Config)
KEYS = frozenset(f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls))
"""Every key of the config, SECTION.KEY."""


def load_config(argv: Sequence[str] | None, prog: str, description: str = "") -> Config:
    """The checked config of a command line (null: this process's own), with train.run_dir filled in.

    prog: the module that `python -m` runs, for --help. --help and --print_config print and raise SystemExit(0).
    Raises UserError with one line, `FILE or command line: KEY: what; valid: ...` or `file:line: what`.
    """
    line = split_command_line(sys.argv[1:] if argv is None else argv)
    if line.help:
        print(help_text(prog, description), end="")
        raise SystemExit(0)
    given = {} if line.config is None else options_of_file(line.config, SECTIONS)
    given |= options_of_texts(line.texts, SECTIONS)
    config = _build(given, line.config or COMMAND_LINE)
    validate(config, {key: g.place for key, g in given.items()}, line.config or COMMAND_LINE)
    config = _with_run_dir(config, line.config)
    if line.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def with_place(failure: UserError, argv: Sequence[str]) -> UserError:
    """Returns a UserError whose place is a key of the config, at the file or the command line that gave the key; any
    other as it is.

    What is wrong with a value often shows long after the config was read, when only the key is known. `argv` may hold
    a program's own flags too.
    """
    key = failure.place.partition("[")[0]
    if key not in KEYS:
        return failure
    given = {option.key: option.value for option in split_options(argv)}
    place = COMMAND_LINE if key in given else given.get("config")
    return failure if place is None else failure.at(f"{place}: {failure.place}")


def to_yaml(config: Config) -> str:
    """The resolved config, every key of it; `load_config` of it gives an equal Config."""
    return dump_yaml(dataclasses.asdict(config))


def _build(given: Mapping[str, Given], place: str) -> Config:
    sections = {}
    for section, cls in SECTIONS.items():
        values = {key.partition(".")[2]: g.value for key, g in given.items() if key.startswith(f"{section}.")}
        for name in required_keys(cls):
            if name not in values:
                kind = describe(get_type_hints(cls)[name])
                key = f"{section}.{name}"
                raise UserError(f"{place}: {key}", "is missing", f"{kind}, in the YAML file or as --{key}")
        sections[section] = cls(**values)
    return Config(**sections)


def _with_run_dir(config: Config, config_file: str | None) -> Config:
    if config.train.run_dir is not None:
        return config
    run_dir = f"runs/{Path(config_file).stem if config_file else 'train'}"
    return dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=run_dir))


def help_text(prog: str, description: str) -> str:
    """Every key with its docstring, type and default."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = f"python -m {prog} [--config FILE] [--SECTION.KEY VALUE ...]"
    parser = ArgumentParser(prog=prog, usage=usage, description=description or None, print_config=None)
    about = "YAML file of SECTION: {KEY: VALUE}; the command line goes over it, a list whole"
    parser.add_argument("--config", metavar="FILE", help=about, default=SUPPRESS)
    about = "print the resolved config as YAML and end"
    parser.add_argument("--print_config", action="store_true", help=about, default=SUPPRESS)
    parser.add_argument("--quiet", action="store_true", help=QUIET, default=SUPPRESS)
    for section, cls in SECTIONS.items():
        _add_help(parser, section, cls)
        if cls is DataConfig:
            _add_help(parser, "data.train[i]", SourceConfig)
    return parser.format_help()


def _add_help(parser: ArgumentParser, prefix: str, cls: Any) -> None:
    """A group for a dataclass; lists are added by hand, since jsonargparse offers options for them that we refuse."""
    lists = {name for name, hint in get_type_hints(cls).items() if get_origin(hint) is list}
    group = parser.add_argument_group((inspect.getdoc(cls) or "").rstrip("."))
    for param in docstring_parser.parse_from_object(cls).params:
        if param.arg_name in lists:
            default = "required" if param.arg_name in required_keys(cls) else "default: []"
            text = f"{param.description} (type: list of the items below, {default})"
            group.add_argument(
                f"--{prefix}.{param.arg_name}", metavar="'[{path: FILE}, ...]'", help=text, default=SUPPRESS
            )
    group.add_class_arguments(cls, prefix, as_group=False, skip=lists)
