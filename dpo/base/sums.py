"""Records the SHA-256 of the files of a folder, in the form of `sha256sum`, and finds files that have changed.

A folder with two files, and SHA256SUMS beside them:

    model.safetensors      5891b5b522d5df08...  model.safetensors
    code/layers.py         e258d248fda94c63...  code/layers.py

`sha256sum --check SHA256SUMS` in the folder does the same as `find_fault`.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

SUMS = "SHA256SUMS"
NO_SUMS = f"{SUMS} is missing or damaged"
"""The fault of a folder whose digests cannot be read."""
_HEX_DIGITS = 64


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content, 64 hex digits. Reads about 2 GB per second."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lies_within(name: str) -> bool:
    """Returns whether a path that a file names stays in the folder of that file: relative, without `..`, backslashes
    and null characters.
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not {"\\", "\0"} & set(name)


def is_plain_name(name: str) -> bool:
    """Returns whether a name is that of a file in the folder itself, without a separator."""
    return lies_within(name) and "/" not in name and name != "."


def sums_text(sums: Mapping[str, str]) -> str:
    """Returns the content of SHA256SUMS for the digests of files by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def read_sums(folder: Path) -> dict[str, str] | None:
    """Returns the digests of SHA256SUMS by file name; None where it is missing or damaged, or names a file outside of
    the folder.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    entries = [line.partition("  ") for line in lines]
    if not entries or not all(len(digest) == _HEX_DIGITS and lies_within(name) for digest, _, name in entries):
        return None
    return {name: digest for digest, _, name in entries}


def find_fault(folder: Path) -> str | None:
    """Returns why the content of a folder cannot be trusted; None where every file that SHA256SUMS lists is as it was
    written. Reads all of them. Other files in the folder are not looked at.
    """
    sums = read_sums(folder)
    return NO_SUMS if sums is None else find_change(folder, sums)


def find_unlisted(sums: Mapping[str, str], names: Iterable[str]) -> str | None:
    """Returns which of some files has no digest, as where SHA256SUMS was cut at the end of a line; None where all have
    one.
    """
    missing = set(names) - sums.keys()
    return f"{min(missing)} is not in {SUMS}" if missing else None


def find_change(folder: Path, sums: Mapping[str, str]) -> str | None:
    """Returns which of some files does not have its digest or is missing; None where all are as they were written."""
    for name, digest in sums.items():
        try:
            if sha256_of(folder / name) != digest:
                return f"{name} has changed"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return f"{name} is missing"
    return None
