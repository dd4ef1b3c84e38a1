"""A config as plain values by name, for the sinks that show one; without TensorBoard."""

import json
from collections.abc import Mapping
from typing import Any

Value = bool | int | float | str


def flat(tree: Mapping[str, Any]) -> dict[str, Value]:
    """Returns SECTION.KEY -> value of a config, as in its YAML; lists as JSON text, keys that are null left out."""
    items = {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
    return {
        key: value if isinstance(value, Value) else json.dumps(value)
        for key, value in items.items()
        if value is not None
    }
