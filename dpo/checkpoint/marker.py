"""The file COMPLETE of a checkpoint: the size and the SHA-256 of every other file, by which damage is found.

    {".metadata": [22699, "5891b5b5..."], "__0_0.distcp": [287878, "e258d248..."], "state.json": [508, "98ea6e4f..."]}

Markers of older versions have null for the hash of a file over 64 MiB: of such a file the size alone is compared.
Files that are not listed do not count: people, NFS and desktops leave them. A shard that is not listed does.

A file that is missing, has another size or another hash, or lies on a bad part of a disk is damaged: an older
checkpoint is used. Any other error may be gone at the next try (a stale handle of NFS, a server that does not answer,
too many open files), so it ends the start, and no checkpoint is given up for it.
"""

import errno
import json
import os
import re
import stat
from pathlib import Path

from dpo.base.errors import RunError
from dpo.base.files import naming, sync, write_file
from dpo.base.sums import is_plain_name, sha256_of

MARKER, METADATA, STATE = "COMPLETE", ".metadata", "state.json"

Inventory = dict[str, tuple[int, str | None]]
"""File name -> size in bytes, and SHA-256."""

_SHARD = re.compile(r"__(\d+)_\d+\.distcp")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""Errors that say that there is no such file."""


def write_marker(folder: Path, files: Inventory) -> None:
    """Writes the marker of a checkpoint, given all other files."""
    write_file(folder / MARKER, json.dumps(dict(sorted(files.items())), indent=1).encode())


def own_files(names: list[str], rank: int, size: int) -> list[str]:
    """Returns the files of a checkpoint that rank `rank` of `size` hashes: the shards that it wrote itself where the
    same number of ranks wrote them; rank 0 also those that are no shards.
    """
    found = {name: _SHARD.fullmatch(name) for name in names}
    return [name for name, shard in found.items() if (int(shard[1]) if shard else 0) % size == rank]


def measure(path: Path) -> tuple[int, str | None]:
    """Returns the size and the SHA-256 of a file that was just written, once it is on the disk."""
    sync(path)
    return path.stat().st_size, sha256_of(path)


def read_marker(folder: Path) -> Inventory | None:
    """Returns the files that the marker of a checkpoint lists; None where it is no marker.

    Raises OSError where it cannot be read.
    """
    try:
        entries = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = {name: (size, digest) for name, (size, digest) in entries.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return files if all(_is_entry(name, *facts) for name, facts in files.items()) else None


def _is_entry(name: str, size: object, digest: object) -> bool:
    known = digest is None or (isinstance(digest, str) and _DIGEST.fullmatch(digest))
    return is_plain_name(name) and name != MARKER and type(size) is int and bool(known)


def list_files(folder: Path) -> tuple[Inventory, str | None]:
    """Returns the files that a checkpoint lists, and why it cannot be used as far as that is seen without reading them;
    None: the files that its marker lists are there, with their sizes, and no other shard. Raises RunError.
    """
    try:
        with naming(folder / MARKER):
            files = read_marker(folder)
        if files is None:
            return {}, f"{MARKER} is broken"
        return files, _find_difference(folder, files)
    except OSError as failure:
        return {}, f"it is not complete: no {MARKER}" if failure.errno in _ABSENT else damage_of(failure, "it")


def _find_difference(folder: Path, files: Inventory) -> str | None:
    for name in (METADATA, STATE):
        if name not in files:
            return f"it is not complete: {MARKER} does not list {name}"
    present = {path.name: os.lstat(path) for path in folder.iterdir()}
    for name in sorted({*present, *files} - {MARKER}):
        if name not in files and name.endswith(".distcp"):
            return f"{name} is not listed in {MARKER}"
        if name in files and name not in present:
            return f"{name} is missing"
        if name in files and not stat.S_ISREG(present[name].st_mode):
            return f"{name} is a link or not a file"
        if name in files and present[name].st_size != files[name][0]:
            return f"{name} has changed: {present[name].st_size} bytes of {files[name][0]}"
    return None if stat.S_ISREG(present[MARKER].st_mode) else f"{MARKER} is a link"


def strays_of(folder: Path, files: Inventory) -> list[str]:
    """Returns the files in a checkpoint that are not its own, without hidden ones."""
    names = {path.name for path in folder.iterdir() if path.name[0] != "."}
    return sorted(names - files.keys() - {MARKER})


def find_change(folder: Path, files: Inventory) -> str | None:
    """Returns the fault of the first of some files that has changed or is damaged; None: all are as written. Raises
    RunError.
    """
    for name, (_, digest) in files.items():
        try:
            with naming(folder / name):
                if digest is not None and sha256_of(folder / name) != digest:
                    return f"{name} has changed"
        except OSError as failure:
            return damage_of(failure, name)
    return None


def damage_of(failure: OSError, name: str) -> str:
    """Returns the fault of the file `name` of a checkpoint, whose reading failed. Raises RunError, with the path that
    the error names, where that does not say that the file is damaged.
    """
    if failure.errno in (*_ABSENT, errno.EIO):
        return f"{name} cannot be read: {failure.strerror}"
    what = "that does not mean that the checkpoint is damaged, so no older one is used; the same command tries again"
    raise RunError(f"{failure.filename} cannot be read: {failure.strerror}; {what}") from failure
