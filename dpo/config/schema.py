"""The JSON schema (draft 2020-12) of the YAML file, for editors; `dpo.config.rules` has further rules between keys.

No key is required, since the command line may give it, except in the items of a list.
"""

import dataclasses
import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from dpo.config.keys import SECTIONS, Key, keys_of
from dpo.config.rules import bound_of

Schema = dict[str, Any]

_TYPES: Mapping[Any, Schema] = {
    bool: {"type": "boolean"},
    str: {"type": "string", "minLength": 1},
    type(None): {"type": "null"},
    Any: {},
}
_NUMBERS: Mapping[Any, str] = {int: "integer", float: "number"}


def config_schema() -> Schema:
    """Returns the schema of a config."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "config of dpo",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _of_class(cls, name, True) for name, cls in SECTIONS.items()},
    }


def _of_class(cls: Any, prefix: str, is_section: bool) -> Schema:
    keys = keys_of(cls)
    schema: Schema = {
        "type": "object",
        "description": " ".join((inspect.getdoc(cls) or "").split()),
        "additionalProperties": False,
        "properties": {key.name: _of_key(key, f"{prefix}.{key.name}") for key in keys},
    }
    required = [key.name for key in keys if key.is_required]
    return schema if is_section or not required else {**schema, "required": required}


def _of_key(key: Key, name: str) -> Schema:
    bound = bound_of(name)
    schema = {**_of_type(key.hint, bound.limits if bound else {}, name), "description": key.text}
    return schema if key.is_required else {**schema, "default": key.default}


def _of_type(hint: Any, limits: Schema, name: str) -> Schema:
    """Returns the schema of a type.

    Args:
        hint: the type of a field; see `dpo.config.reading.fit`.
        limits: the bounds of its numbers, in the words of a schema.
        name: the key.
    """
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _of_class(hint, name, False)
    if hint in _NUMBERS:
        return {"type": _NUMBERS[hint], **limits}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is list:
        return {"type": "array", "items": _of_type(args[0], limits, f"{name}[i]")}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_type(args[1], limits, name)}
    if origin is tuple:
        return {
            "type": "array",
            "prefixItems": [_of_type(arg, limits, name) for arg in args],
            "minItems": len(args),
            "items": False,
        }
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of_type(arg, limits, name) for arg in args]}
    return _TYPES[hint]
