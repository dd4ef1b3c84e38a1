"""The base of a folder of adapters, which its adapter_config.json names. Without torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from dpo.adapters.reading import ADAPTER_CONFIG
from dpo.base.errors import UserError
from dpo.hub.ids import is_hub_id

VALID = "base_model_name_or_path in it: the base's folder or hub id"


@dataclass(frozen=True)
class NamedModel:
    """A model by the folders or hub ids that name it."""

    base: str
    """The whole model."""
    adapters: str | None = None
    """The adapters that it has; None: none."""

    def __str__(self) -> str:
        return f"{self.adapters} on {self.base}" if self.adapters else self.base


def name_model(path: str, place: str) -> NamedModel:
    """Returns the model that a folder or hub id names: of a local folder of adapters these, and their base.

    Args:
        path: a folder or hub id.
        place: the flag or key that gave it, for errors.

    Raises:
        UserError: the folder's adapter_config.json cannot be read, or its base is not here.
    """
    if not (Path(path) / ADAPTER_CONFIG).is_file():
        return NamedModel(path)
    base = _read_base(Path(path) / ADAPTER_CONFIG)
    if not Path(base).exists() and not is_hub_id(base):
        raise UserError(place, f"{path} holds adapters, whose base {base} is not here", VALID)
    return NamedModel(base, path)


def _read_base(file: Path) -> str:
    """Returns the base that an adapter_config.json names."""
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as failure:
        raise UserError(str(file), f"names no base: {failure}", VALID) from failure
    if not isinstance(base, str) or not base:
        raise UserError(str(file), f"names no base: base_model_name_or_path is {base!r}", VALID)
    return base
