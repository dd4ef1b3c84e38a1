"""The SHA-256 of the files of a hub's data set, kept in our cache.

The folder in which `datasets` keeps the rows belongs to all programs of the user, who may have files of their own
there: nothing is written to it or removed from it.

    CACHE/dpo/hub-sums-<hash of the folder>-<hash of the split>    the digests of dataset_info.json and of the split's
                                                                   files, with a hash of their own
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.base.errors import UserError
from dpo.base.files import write_atomically
from dpo.base.sums import find_change, is_plain_name, sha256_of
from dpo.config import SourceConfig
from dpo.hub.snapshots import PREPARE
from dpo.sources.caching import cache_path, datasets_cache, digest
from dpo.sources.kept import FindFault, timed, trust
from dpo.terminal.console import say

if TYPE_CHECKING:
    import datasets


def check_files(folder: Path, config: SourceConfig, key: str, fault_of: FindFault) -> None:
    """Compares the files of a split with the digests that `keep_digests` wrote, unless `fault_of` is `trust`.

    Raises UserError where a file has changed or is missing.
    """
    sums = _read(_file(folder, config.split))
    if sums is None or fault_of is trust:
        return
    fault = timed(config.path, [folder / name for name in sums], lambda: find_change(folder, sums))
    if fault:
        what = f"{config.path}: its rows in {folder} are damaged: {fault}"
        raise UserError(f"{key}.path", what, f"that folder removed, then {PREPARE}")


def keep_digests(rows: "datasets.Dataset", split: str) -> None:
    """Writes the digests of the files of a split, where there are none, or not of all."""
    import datasets

    paths = [Path(file["filename"]) for file in rows.cache_files]
    if not paths:
        return
    folder, names = paths[0].parent, sorted({datasets.config.DATASET_INFO_FILENAME, *(path.name for path in paths)})
    file = _file(folder, split)
    if set(names) <= (_read(file) or {}).keys():
        return
    if file.exists():
        say(f"cache: {file} is damaged and made again; the files of {folder} are taken as they are")
    sums = {name: sha256_of(folder / name) for name in names}
    write_atomically(file, json.dumps({"sha256": _hash(file, sums), "files": sums}, indent=1).encode())


def forget_digests(folder: Path) -> None:
    """Removes the digests of all splits of a folder, which was made anew."""
    for file in cache_path("").glob(f"{_file(folder, '').name.rpartition('-')[0]}-*"):
        file.unlink(missing_ok=True)


def _file(folder: Path, split: str) -> Path:
    """Returns the file of the digests of a split."""
    place = folder.relative_to(datasets_cache()).as_posix()
    return cache_path(f"hub-sums-{digest([place])}-{digest([split])}")


def _read(file: Path) -> dict[str, str] | None:
    """Returns the digests by file name; None where there are none, or they are damaged."""
    try:
        content = json.loads(file.read_bytes())
        sums: dict[str, str] = content["files"]
        if content["sha256"] == _hash(file, sums) and all(map(is_plain_name, sums)):
            return sums
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _hash(file: Path, sums: Mapping[str, str]) -> str:
    """Returns the hash of the name of a file of digests and of what it holds."""
    return sha256(json.dumps([file.name, sums], sort_keys=True).encode()).hexdigest()
