"""Folders of the cache with the SHA-256 of their files, which are made again where a file is damaged.

    tokens-HASH/SHA256SUMS               beside the token rows of a source, HASH-00000.arrow, written with them
    pairs-HASH/SHA256SUMS                beside the pairs of all sources, HASH/
    rows-HASH/.../0.0.0/SHA256SUMS       beside the raw rows that `datasets` keeps, written once they are there

Each start checks them once a node: its first rank passes `find_fault`, the others `trust`, which removes nothing.
"""

import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from dpo.base import sums
from dpo.base.files import make_folder_atomically, remove_folder, write_atomically
from dpo.base.sums import SUMS, read_sums, sha256_of, sums_text
from dpo.base.units import shown_bytes
from dpo.terminal.console import say

if TYPE_CHECKING:
    import datasets

FindFault = Callable[[Path], str | None]
"""A folder -> why its content cannot be trusted, or None."""
LONG_SECONDS = 1.0
"""A check that takes longer is told."""
LEFT_SECONDS = 24 * 3600.0
"""Seconds after its last change until a folder that is being written, or removed, counts as left by a killed start."""
_LEFT = re.compile(r"\.[0-9a-f]{32}\.(draft|damaged)")


def trust(folder: Path) -> None:
    """Takes the place of `find_fault` on ranks of a node whose first rank has checked the same folder."""


def find_fault(folder: Path) -> str | None:
    """Returns why a folder of the cache cannot be trusted: a file is not as it was written, or is not listed."""
    return sums.find_fault(folder) or _unlisted(folder)


def keep_folder(folder: Path, fill: Callable[[Path], None], fault_of: FindFault) -> None:
    """Makes a folder of the cache where it does not exist, and again, with a message, where it is damaged.

    Args:
        folder: the folder, `KIND-HASH`.
        fill: writes its files into the empty folder that it is given; their names begin with HASH, so that the files
            of another folder, whole as they are, are not taken for them.
        fault_of: finds the fault of the folder, where it exists.
    """

    def fill_and_sum(draft: Path) -> None:
        fill(draft)
        _write_sums(draft)

    if folder.is_dir():
        find = trust if fault_of is trust else lambda path: fault_of(path) or _foreign(path)
        _remove(folder, _fault(folder, find))
    if not folder.is_dir():
        _remove_left(folder.parent)
        make_folder_atomically(folder, fill_and_sum)


def remove_damaged(folder: Path, fault_of: FindFault) -> None:
    """Removes each folder at or below `folder` that `keep_sums` has marked and whose files have changed since."""
    for file in sorted(folder.rglob(SUMS)):
        _remove(file.parent, _fault(file.parent, fault_of))


def keep_sums(rows: "datasets.Dataset") -> None:
    """Writes SHA256SUMS beside the files of rows in a folder of `datasets`, where there is none yet."""
    for folder in {Path(file["filename"]).parent for file in rows.cache_files}:
        if not (folder / SUMS).exists():
            _write_sums(folder)


def arrow_files(folder: Path) -> list[Path]:
    """Returns the files of the rows that `datasets` keeps at or below `folder`, in their order; none where it has not
    ended to write them, or keeps several sets of rows there.
    """
    complete = [file.parent for file in folder.rglob(SUMS)]
    return sorted(complete[0].glob("*.arrow")) if len(complete) == 1 else []


def _write_sums(folder: Path) -> None:
    write_atomically(folder / SUMS, sums_text({name: sha256_of(folder / name) for name in _names(folder)}).encode())


def _names(folder: Path) -> list[str]:
    """Returns the files in a folder and below that matter, sorted: not hidden ones, as NFS leaves, nor locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name[0] != "."]
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.name != SUMS)


def _unlisted(folder: Path) -> str | None:
    """Returns that a file is not in SHA256SUMS, which was cut off then; None where all are."""
    return sums.find_unlisted(read_sums(folder) or {}, _names(folder))


def _foreign(folder: Path) -> str | None:
    """Returns that a file is of another folder, whose hash its name has; None where all are this folder's."""
    own = folder.name.rpartition("-")[2]
    others = [name for name in _names(folder) if not name.startswith(own)]
    return f"{others[0]} is of another folder" if others else None


def _fault(folder: Path, fault_of: FindFault) -> str | None:
    return timed(folder.name, [folder / name for name in _names(folder)], lambda: fault_of(folder))


def timed(what: str, files: Sequence[Path], find: Callable[[], str | None]) -> str | None:
    """Returns the fault that `find` finds in some files, which are called `what`; tells the seconds where they are
    many.
    """
    started = time.monotonic()
    fault = find()
    seconds = time.monotonic() - started
    if seconds > LONG_SECONDS:
        size = sum(file.stat().st_size for file in files if file.is_file())
        say(f"cache: {what}: SHA-256 of {shown_bytes(size)} checked in {seconds:.1f} s")
    return fault


def _remove(folder: Path, fault: str | None) -> None:
    """Removes a folder that has a fault, and tells it."""
    if fault:
        say(f"cache: {folder} is damaged and made again: {fault}")
        remove_folder(folder, f".{uuid.uuid4().hex}.damaged")


def _remove_left(cache: Path) -> None:
    """Removes the folders that killed starts have left half-written in the cache, and tells their size."""
    for folder in cache.glob(".*"):
        if _LEFT.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with suppress(FileNotFoundError):  # another start ends to write it, or removes it, at this moment
                _remove_if_old(folder)


def _remove_if_old(folder: Path) -> None:
    found = [path.lstat() for path in (folder, *folder.rglob("*"))]
    if time.time() - max(stat.st_mtime for stat in found) > LEFT_SECONDS:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():  # another user's
            return
        size = sum(stat.st_size for stat in found if S_ISREG(stat.st_mode))
        say(f"cache: removed {folder}, {shown_bytes(size)}, which a killed start has left")
