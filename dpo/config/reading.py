"""Strict reading of config files and command lines against the types of dataclasses, whatever their keys mean.

Every problem raises UserError: one line with the place, the problem and the valid values.
"""

import math
import re
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from dpo.base.errors import UserError
from dpo.command.likeness import meant
from dpo.command.line import COMMAND_LINE, SWITCHES, Option, check_once, split_options
from dpo.config.hints import check_setting, not_a_key, unknown_flag, unknown_key, wrong_word
from dpo.config.keys import SECTIONS
from dpo.config.shipped import near_config, shipped_configs
from dpo.config.strict_yaml import parse_yaml, read_yaml_file


@dataclass(frozen=True)
class CommandLine:
    """A command line, split into keys and texts that are not yet checked."""

    config: str | None
    """The file of --config."""
    texts: dict[str, str]
    """KEY -> text of --KEY TEXT, without --config."""
    switches: frozenset[str]
    """The names of --help, also for -h, --print_config and other flags of every program that have no value."""


def split_command_line(argv: Sequence[str], own: Collection[str] = ()) -> CommandLine:
    """Splits a command line of keys of the config: --KEY VALUE, --KEY=VALUE, KEY=VALUE, and FILE.yaml. A value may
    begin with one dash, not with two (except after "="). Raises UserError for a word that belongs to no key, for a key
    without a value, and for a key that is given twice.

    Args:
        argv: the words.
        own: the names of the program's own flags, for the error about a flag that does not exist.
    """
    options, texts, switches = split_options(argv), {}, set()
    for option in options:
        if option.is_help or (option.key in SWITCHES and option.value is None):
            switches.add(option.key or "help")
            continue
        key, value = _key_and_value(option, own)
        texts[key] = value
    check_once(options)
    config = texts.pop("config", None)
    return CommandLine(config, texts, frozenset(switches))


def _key_and_value(option: Option, own: Collection[str]) -> tuple[str, str]:
    check_setting(option)
    if option.key is not None and not option.is_config and option.key not in SECTIONS:
        raise unknown_flag(option.key, own)
    if option.key is None:
        _wrong(COMMAND_LINE, repr(option.value), "unexpected word", "FILE.yaml, SECTION.KEY=VALUE, --SECTION.KEY VALUE")
    if option.value is None:
        _wrong(COMMAND_LINE, option.key, "has no value", f"--{option.key} VALUE, --{option.key}=VALUE")
    return option.key, option.value


@dataclass(frozen=True)
class Given:
    """A value of the right type, and the place that set it."""

    value: Any
    place: str
    """The YAML file's name, or `command line`."""


def options_of_file(path: str, sections: Mapping[str, type]) -> dict[str, Given]:
    """Reads a YAML file into SECTION.KEY -> value with its type checked; an empty file gives an empty dict."""
    try:
        tree = read_yaml_file(path)
    except OSError as error:
        guess = meant(near_config(path, shipped_configs())) if isinstance(error, FileNotFoundError) else ""
        valid = "the path of a YAML file; `dpo configs` lists those that come with dpo"
        _wrong(COMMAND_LINE, "config", f"cannot read {path!r} ({error.strerror}){guess}", valid)
    given = {}
    for section, keys in _mapping({} if tree is None else tree, path, "", list(sections)).items():
        hints = get_type_hints(sections[section])
        for name, value in _mapping(keys, path, section, list(hints)).items():
            key = f"{section}.{name}"
            given[key] = Given(fit(value, hints[name], path, key), path)
    return given


def options_of_texts(texts: Mapping[str, str], sections: Mapping[str, type]) -> dict[str, Given]:
    """Reads the texts of a command line into SECTION.KEY -> value with its type checked."""
    given = {}
    for key, text in texts.items():
        section, _, name = key.partition(".")
        if section not in sections:
            raise unknown_key(COMMAND_LINE, key, list(sections))
        hints = get_type_hints(sections[section])
        if not name:
            what = f"is a section, not a key{not_a_key(key)}"
            _wrong(COMMAND_LINE, key, what, ", ".join(f"--{key}.{name}" for name in hints))
        head = re.split(r"[.\[]", name)[0]
        if head != name and get_origin(hints.get(head)) is list:
            _wrong(COMMAND_LINE, key, "unknown key", f"the whole list, --{section}.{head} {example(hints[head])}")
        if name not in hints:
            raise unknown_key(COMMAND_LINE, key, list(hints))
        value = _value_of_text(text, hints[name], key)
        given[key] = Given(fit(value, hints[name], COMMAND_LINE, key), COMMAND_LINE)
    return given


def _value_of_text(text: str, hint: Any, key: str) -> Any:
    """Returns a text of the command line unchanged where the type `hint` takes text (but "null" as None if allowed),
    else parsed as YAML.
    """
    kinds = _alternatives(hint)
    if text == "null" and type(None) in kinds:
        return None
    names = any(get_origin(kind) is Literal for kind in kinds)
    takes_list = any(get_origin(kind) is list for kind in kinds)
    if str in kinds and not (takes_list and text.startswith("[")):
        return text
    if names and bool not in kinds:  # of `bool | Literal["auto"]`, true is not a name
        return text
    return parse_yaml(text, lambda line: f"{COMMAND_LINE}: {key}", valid=describe(hint))


def fit(value: Any, hint: Any, place: str, key: str) -> Any:
    """Returns `value` as the type `hint`, or raises UserError. Nothing is coerced except an integer to a float.

    Args:
        value: plain data, as YAML gives it.
        hint: bool, int, float, str, Any, Literal of texts, list[X], dict[str, X], tuple[X, Y], X | None or a
            dataclass.
        place: file name or `command line`, for the error.
        key: SECTION.KEY, for the error.
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return _fit_dataclass(value, hint, place, key)
    if origin is dict and isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: fit(item, get_args(hint)[1], place, f"{key}.{name}") for name, item in value.items()}
    if origin is list and isinstance(value, list):
        return [fit(item, get_args(hint)[0], place, f"{key}[{i}]") for i, item in enumerate(value)]
    kinds = _alternatives(hint)
    for kind in (kind for kind in kinds if get_origin(kind) is list and isinstance(value, list)):
        return fit(value, kind, place, key)
    for kinds_of_items in (get_args(kind) for kind in kinds if get_origin(kind) is tuple):
        if isinstance(value, list) and len(value) == len(kinds_of_items):
            return tuple(fit(item, kinds_of_items[i], place, f"{key}[{i}]") for i, item in enumerate(value))
    if type(value) in kinds and not (isinstance(value, float) and not math.isfinite(value)) and value != "":
        return value
    if type(value) is int and float in kinds and math.isfinite(_as_float(value)):
        return float(value)
    names = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    if isinstance(value, str) and value in names:
        return value
    if isinstance(value, str) and names and bool not in kinds:
        _wrong(place, key, *wrong_word(key, value, names))
    return _wrong(place, key, f"got {_short(value)}", describe(hint))


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _fit_dataclass(value: Any, cls: Any, place: str, key: str) -> Any:
    hints = get_type_hints(cls)
    values = {}
    for name, item in _mapping(value, place, key, list(hints)).items():
        values[name] = fit(item, hints[name], place, f"{key}.{name}")
    for name in required_keys(cls):
        if name not in values:
            _wrong(place, f"{key}.{name}", "is missing", describe(hints[name]))
    return cls(**values)


def required_keys(cls: Any) -> list[str]:
    """Returns the names of the fields of a dataclass that have no default."""
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def _mapping(value: Any, place: str, key: str, names: list[str]) -> dict[str, Any]:
    """Returns `value` if it is a mapping whose keys are all in `names`, or raises UserError."""
    if not isinstance(value, dict):
        _wrong(place, key, f"got {_short(value)}{not_a_key(key)}", f"a mapping of {', '.join(names)}")
    for name in value:
        if name not in names:
            raise unknown_key(place, f"{key}.{name}" if key else f"{name}", names)
    return value


_MANY: Mapping[Any, str] = {str: "texts", int: "integers", float: "finite numbers"}
"""Type of the items of a list -> their name."""


def describe(hint: Any) -> str:
    """Returns the valid values of a type in words, for an error."""
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a finite number",
        str: "text (not empty)",
        type(None): "null",
    }
    if hint in words:
        return words[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(args)
    if origin is list:
        if is_dataclass(args[0]):
            return f"a list of {{{', '.join(get_type_hints(args[0]))}}}"
        few = get_args(args[0])[:2]
        return f"a list of {describe(args[0])}, as in [{', '.join(few)}]" if few else f"a list of {_MANY[args[0]]}"
    if origin is dict:
        return "a mapping {NAME: VALUE, ...}"
    if origin is tuple:
        return f"a list of {len(args)} values, each {describe(args[0])}"
    joint = ", or " if any(get_origin(kind) is tuple for kind in args) else " or "
    return joint.join(describe(kind) for kind in args)


def example(hint: Any) -> str:
    """Returns a list of the type `hint` as a word of the command line."""
    item = get_args(hint)[0]
    words = [f"{{{required_keys(item)[0]}: FILE}}"] if is_dataclass(item) else get_args(item)[:2]
    return f"'[{', '.join([*words, '...'] if len(words) == 1 else words)}]'"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _short(value: Any) -> str:
    """Returns a value as an error shows it: its kind, and at most 60 characters of it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {str: "the text", int: "the integer", float: "the number", list: "a list", dict: "a mapping"}
    text = repr(value)
    return f"{kinds.get(type(value), 'a value')} {text if len(text) <= 60 else text[:57] + '...'}"


def _wrong(place: str, key: str, what: str, valid: str) -> NoReturn:
    raise UserError(f"{place}: {key}" if key else place, what, valid)
