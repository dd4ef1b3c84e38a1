"""The keys of the config as a table: sections, types, defaults, and the docstrings under the fields."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from dpo.config.fields import Config

SECTIONS: Mapping[str, type] = get_type_hints(Config)
KEYS: Sequence[str] = [
    f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)
]
"""Every key of the config, SECTION.KEY."""


@dataclass(frozen=True)
class Key:
    """A field of a section, or of an item of a list in it."""

    name: str
    hint: Any
    """Its type."""
    text: str
    """Its docstring, as one line."""
    is_required: bool
    default: Any
    """None where it is required."""


def keys_of(cls: Any) -> list[Key]:
    """Returns the fields of a dataclass with their docstrings."""
    hints, texts, keys = get_type_hints(cls), _texts(cls), []
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        is_required = default is dataclasses.MISSING
        keys.append(
            Key(field.name, hints[field.name], texts[field.name], is_required, None if is_required else default)
        )
    return keys


def _texts(cls: Any) -> dict[str, str]:
    """Returns the docstring under each field, which Python itself does not keep."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            texts[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return texts


def defaults_of(cls: Any) -> dict[str, Any]:
    """Returns the defaults of the fields of a dataclass that have one."""
    found = dataclasses.fields(cls)
    made = {key.name: key.default_factory() for key in found if key.default_factory is not dataclasses.MISSING}
    return made | {key.name: key.default for key in found if key.default is not dataclasses.MISSING}


def changed_settings(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a dataclass, as in a config file, that are not at their defaults."""
    defaults = defaults_of(cls)
    return {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}
