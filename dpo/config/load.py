"""Reads a YAML file and a command line into a checked Config (`load_config`), and writes a Config as YAML (`to_yaml`).

The command line (--SECTION.KEY) overrides the file of --config, which overrides the defaults in `fields`.
"""

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import get_type_hints

from dpo.base.errors import UserError
from dpo.command.line import COMMAND_LINE, own_flags, split_options
from dpo.config.fields import Config
from dpo.config.help import print_about_config
from dpo.config.keys import KEYS, SECTIONS
from dpo.config.peft_folder import resolve_adapters
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


def load_config(argv: Sequence[str] | None, prog: str, own: Collection[str] = ()) -> Config:
    """Reads and checks the config that a command line gives, and fills in train.run_dir. Where model.path is a folder
    of adapters, that is taken as lora.path, and its base as model.path.

    Args:
        argv: the words of the command line; None: sys.argv[1:].
        prog: the module that `python -m` runs, for the text of --help.
        own: the names of the program's own flags, for the error about a flag that does not exist.

    Raises:
        UserError: with one line, `FILE or command line: KEY: problem; valid: ...` or `file:line: problem`.
        SystemExit: with code 0, after --help, --help-config, --config-schema or --print_config has printed.
    """
    line = split_command_line(sys.argv[1:] if argv is None else argv, own)
    if "help" in line.switches:
        print(own_flags(f"python -m {prog}").format_help(), end="")
        raise SystemExit(0)
    print_about_config(line.switches)
    given = {} if line.config is None else options_of_file(line.config, SECTIONS)
    given |= options_of_texts(line.texts, SECTIONS)
    config = _build(given, line.config or COMMAND_LINE)
    config = resolve_adapters(config, given["model.path"].place)
    validate(config, {key: g.place for key, g in given.items()}, line.config or COMMAND_LINE)
    config = _with_run_dir(config, line.config)
    if "print_config" in line.switches:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def with_place(failure: UserError, argv: Sequence[str]) -> UserError:
    """Returns a UserError whose place is a config key with the place that set the key, the file or the command line,
    before it. An error with another place, or about a key that was not set, is returned unchanged.

    Many wrong values show only long after the config was read, where the code knows the key but not its place.

    Args:
        failure: the error.
        argv: the command line of the program; it may hold flags that are not keys of the config.
    """
    key = failure.place.partition("[")[0]
    if key not in KEYS:
        return failure
    given = {option.key: option.value for option in split_options(argv)}
    file = given.get("config")
    place = COMMAND_LINE if key in given else file if file is not None and _sets(file, key) else None
    return failure if place is None else failure.at(f"{place}: {failure.place}")


def _sets(file: str, key: str) -> bool:
    """Returns whether a YAML file has a key of the config."""
    try:
        return key in options_of_file(file, SECTIONS)
    except UserError:  # the file has changed since
        return False


def to_yaml(config: Config) -> str:
    """Returns the config as YAML text with every key. `load_config` of that text gives an equal Config."""
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
