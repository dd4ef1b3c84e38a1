"""Data sets in folders that `save_to_disk` of `datasets` wrote; their indices may name files of their folder alone."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.base.errors import UserError
from dpo.base.sums import is_plain_name
from dpo.config import SourceConfig
from dpo.sources.caching import first_line

if TYPE_CHECKING:
    import datasets

INDEX, SPLITS = "state.json", "dataset_dict.json"
"""The files in which `save_to_disk` names the files of a data set, and the folders of its splits."""


def is_saved(folder: Path) -> bool:
    """Returns whether `save_to_disk` wrote the folder."""
    return (folder / INDEX).exists() or (folder / SPLITS).exists()


def open_saved(config: SourceConfig, path: Path, key: str) -> "datasets.Dataset":
    """Opens the data set of a folder that `save_to_disk` wrote, or one of its splits.

    Raises:
        UserError: the folder cannot be loaded, has no such split or no rows, or an index names a file outside of it.
    """
    import datasets

    if outside := _names_outside(path):
        what = f"{config.path}: names the file {outside[0]!r}"
        raise UserError(f"{key}.path", what, "names of files and splits in the same folder")
    try:
        saved = datasets.load_from_disk(str(path))
    except IndexError as error:  # `datasets` raises it where no file holds a row
        raise UserError(config.path, "empty, it has no rows", "at least one row") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{key}.path", f"{config.path}: cannot be loaded: {first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if config.split not in saved:
            raise UserError(f"{key}.split", f"{config.path} has no split {config.split}", ", ".join(saved))
        return saved[config.split]
    if config.split not in ("train", str(saved.split)):
        raise UserError(f"{key}.split", f"{config.path} holds one set without splits", "no split")
    return saved


def _names_outside(folder: Path) -> list[str]:
    """Returns the names in the indices of a folder that `save_to_disk` wrote which are not those of files or splits in
    it; none of a broken index, which `datasets` refuses.
    """
    try:
        splits = json.loads((folder / SPLITS).read_bytes())["splits"] if (folder / SPLITS).exists() else []
        if outside := [split for split in splits if not is_plain_name(split)]:
            return outside
        indices = [json.loads((folder / split / INDEX).read_bytes()) for split in splits or ["."]]
        names = [file["filename"] for index in indices for file in index["_data_files"]]
        return [name for name in names if not is_plain_name(name)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
