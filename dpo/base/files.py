"""Atomic writes: no reader sees a file or folder half-written; the caches' folder; bytes as text."""

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name `path` to an OSError of the with-block that names no file, as a write to a full disk raises."""
    try:
        yield
    except OSError as failure:
        code = errno.ENOSPC if _SHORT.fullmatch(str(failure)) else failure.errno
        if code is None or failure.filename is not None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from failure


_SHORT = re.compile(r"\d+ requested and \d+ written")
"""The message of numpy's `tofile` for a file that takes no more bytes; it drops the system's error."""


def write_atomically(target: Path, content: bytes | memoryview) -> None:
    """Writes a file atomically: readers see the old content or the new, with several writers and after a crash too.

    Raises OSError with the name of the file: an error of a full disk has none, or that of a file that nobody knows.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{uuid.uuid4().hex}.draft")  # readers look for the target by its name
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as failure:
        with suppress(OSError):
            draft.unlink()
        raise OSError(failure.errno, failure.strerror, str(target)) from failure


def make_folder_atomically(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder atomically: it exists with all its files or not at all.

    If another job makes `target` at the same time, that folder stays and this draft is removed.

    Args:
        target: the folder to make.
        fill: writes the files into the draft folder that it is given.

    Raises:
        OSError: if the folder cannot be written and no other job has made it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{uuid.uuid4().hex}.draft")
    draft.mkdir()
    try:
        with naming(target):
            fill(draft)
        sync_tree(draft)
        draft.rename(target)
        sync(target.parent)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Waits until all files in a folder and below, and the lists of files, are on the disk (`sync`)."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path, name: str) -> None:
    """Renames a folder to `name`, in the same parent, and removes it, both where it exists.

    So the folder is gone at once, as a whole, also after a crash. Files that cannot be removed stay under the new name:
    on NFS a file that a process has open is renamed to .nfs..., and the folder is then not empty.

    Args:
        folder: the folder.
        name: a name that the caller removes later, if it still exists then; it must not exist.
    """
    try:
        moved = folder.rename(folder.with_name(name))
    except FileNotFoundError:
        return
    shutil.rmtree(moved, ignore_errors=True)


def timed_write(file: Path, num_bytes: int) -> float:
    """Writes random bytes, which no file system can compress, and returns the seconds until they are on the disk."""
    content = os.urandom(2**20) * (num_bytes // 2**20)
    started = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        view = memoryview(content)
        while view:
            view = view[out.write(view) :]
        os.fsync(out.fileno())
    return time.perf_counter() - started


def nearest_existing(folder: Path) -> Path:
    """Returns the folder, or its nearest parent that exists, as an absolute path."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def default_cache_dir() -> Path:
    """Returns $DPO_CACHE, or ~/.cache/dpo where that is unset or empty."""
    return Path(os.environ.get("DPO_CACHE") or "~/.cache/dpo").expanduser()
