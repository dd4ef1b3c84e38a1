"""The texts of --help-config and --config-schema: every key with its type, default, bounds and docstring."""

import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import is_dataclass
from textwrap import wrap
from typing import Any, get_args, get_origin

from dpo.config.keys import SECTIONS, Key, keys_of
from dpo.config.reading import describe
from dpo.config.rules import bound_of
from dpo.config.schema import config_schema

COLUMNS = 100


def config_help() -> str:
    """Returns every key of the config by section, with its type, default and docstring."""
    usage = "Keys of the config: SECTION: {KEY: VALUE} in a YAML file, SECTION.KEY=VALUE on the command line."
    lines = [usage]
    for section, cls in SECTIONS.items():
        lines += _section_lines(section, cls)
    return "\n".join(lines) + "\n"


def _section_lines(prefix: str, cls: Any) -> Iterator[str]:
    """Yields the heading of a dataclass and its keys, then those of the items of its lists, once for each class."""
    yield ""
    yield from wrap(" ".join((inspect.getdoc(cls) or "").split()), COLUMNS)
    items: dict[Any, str] = {}
    for key in keys_of(cls):
        name = f"{prefix}.{key.name}"
        yield from wrap(f"{name}: {_kind(name, key)}", COLUMNS, initial_indent="  ", subsequent_indent="    ")
        yield from wrap(key.text, COLUMNS, initial_indent="      ", subsequent_indent="      ")
        if _is_of_items(key.hint):
            items.setdefault(get_args(key.hint)[0], f"{name}[i]")
    for item, place in items.items():
        yield from _section_lines(place, item)


def _is_of_items(hint: Any) -> bool:
    return get_origin(hint) is list and is_dataclass(get_args(hint)[0])


def _kind(name: str, key: Key) -> str:
    """Returns the type and the bounds of a key, and its default."""
    bound = bound_of(name)
    kind = bound.valid if bound else "a list of the items below" if _is_of_items(key.hint) else describe(key.hint)
    return f"{kind} ({'required' if key.is_required else f'default: {shown_value(key.default)}'})"


def shown_value(value: Any) -> str:
    """Returns a value of a key as YAML has it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown_value, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


TEXTS: Mapping[str, Callable[[], str]] = {
    "help-config": config_help,
    "config-schema": lambda: json.dumps(config_schema(), indent=2) + "\n",
}
"""Flag of every program that reads a config -> the text that it prints."""


def print_about_config(flags: Collection[str]) -> None:
    """Prints the text of --help-config or --config-schema, if it is among `flags`, and raises SystemExit(0)."""
    for flag in TEXTS:
        if flag in flags:
            print(TEXTS[flag](), end="")
            raise SystemExit(0)
