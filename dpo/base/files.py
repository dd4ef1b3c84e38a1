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

from dpo.base.units import shown_bytes


@contextmanager
def naming(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Adds the name `path` to an OSError of the with-block that names no file, as a write to a full disk raises.

    Args:
        path: the file or folder that the block writes.
        num_bytes: of it, which `space.describe_full` tells; None: not known.
    """
    try:
        yield
    except OSError as failure:
        code = errno.ENOSPC if _SHORT.fullmatch(str(failure)) else failure.errno
        if code is None or failure.filename is not None:
            raise
        named = OSError(code, os.strerror(code), str(path))
        if num_bytes is not None:
            named.add_note(f"{NEED}{shown_bytes(num_bytes)}")
        raise named from failure


NEED = "to write: "
"""The beginning of a note of an OSError that tells the size of what could not be written, such as `3.2 KiB`."""


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
        named = OSError(failure.errno, failure.strerror, str(target))
        named.add_note(f"{NEED}{shown_bytes(len(content))}")
        raise named from failure


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
    except OSError as failure:
        written = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
        failure.add_note(f"{NEED}more than {shown_bytes(written)}")
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Waits until all files in a folder and below, and the lists of files, are on the disk (`sync`)."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the list of files in a folder, is on the disk. Some file systems cannot
    do that for a folder, and say so: there it does nothing. Raises OSError, with the path: NFS may tell here first that
    the disk is full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as failure:
        if failure.errno not in _CANNOT_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


_CANNOT_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)


def replace_folder(draft: Path, target: Path, name: str) -> None:
    """Gives a folder another name, and waits until that is on the disk; then removes the folder that had the name.

    Args:
        draft: the folder, whose files are on the disk already (`sync_tree`).
        target: its new name, in the same parent; what has the name is renamed to `name` first.
        name: a name that the caller removes later, if it still exists then; it must not exist.
    """
    old = target.with_name(name)
    with suppress(FileNotFoundError):
        target.rename(old)
    draft.rename(target)
    sync(target.parent)
    _remove(old)


def remove_folder(folder: Path, name: str) -> None:
    """Renames a folder to `name`, in the same parent, and removes it, both where it exists.

    So the folder is gone at once, as a whole, also after a crash. Files that cannot be removed stay under the new name:
    on NFS a file that a process has open is renamed to .nfs..., and the folder is then not empty.

    Args:
        folder: the folder; of a link, the link alone is removed.
        name: a name that the caller removes later, if it still exists then; it must not exist.
    """
    with suppress(FileNotFoundError):
        _remove(folder.rename(folder.with_name(name)))


def _remove(path: Path) -> None:
    """Removes a folder as far as possible, or a link or a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
