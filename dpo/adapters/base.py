"""The base of adapters that are named as a model is, which their adapter_config.json names. Without torch."""

from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import InvalidValue, UserError
from dpo.config.peft_folder import base_of
from dpo.hub.files import ADAPTER_CONFIG, CONFIG, find_config, is_of_adapters
from dpo.hub.ids import is_hub_id
from dpo.hub.snapshots import cached_snapshot, find_snapshot

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
    """Returns the model that a folder or hub id names: of adapters these, and their base. Asks the hub only where its
    cache does not tell what a repository holds.

    Args:
        path: a folder or hub id.
        place: the flag or key that gave it, for errors.

    Raises:
        UserError: the hub does not give the repository; or adapter_config.json cannot be read, or names no base that is
            here.
        RunError: the disk has no room for the download of a config.
    """
    folder = _find_config_folder(path, place)
    if not is_of_adapters(folder):
        return NamedModel(path)
    base = base_of(folder)
    if base is None:
        raise UserError(place, f"{path} holds adapters, and its {ADAPTER_CONFIG} names no base", VALID)
    if not Path(base).exists() and not is_hub_id(base):
        raise UserError(place, f"{path} holds adapters, whose base {base} is not here", VALID)
    return NamedModel(base, path)


def _find_config_folder(path: str, place: str) -> Path:
    """Returns the folder with the config of a model or of adapters; of a path that names none, the path itself."""
    if Path(path).exists() or not is_hub_id(path):
        return Path(path)
    cached = cached_snapshot(path)
    if cached and find_config(cached):
        return cached
    try:
        return find_snapshot(path, CONFIG)
    except InvalidValue as failure:
        raise failure.at(place) from failure
