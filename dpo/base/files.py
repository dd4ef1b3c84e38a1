"""Atomic writes: no reader sees a file or folder half-written; the caches' folder; bytes as text."""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpo.base.full_disk import full_code
from dpo.base.units import shown_bytes


@contextmanager
def naming(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Adds the name `path` to an OSError of the with-block that names no file, as a write to a full disk raises; an
    exception of a library that means a full disk becomes an OSError.

    Args:
        path: the file or folder that the block writes.
        num_bytes: of it, which `space.describe_full` tells; None: not known.
    """
    try:
        yield
    except Exception as failure:
        full = full_code(failure)
        if full is not None and num_bytes is not None and not has_need(failure):
            failure.add_note(f"{NEED}{_shown(num_bytes)}")
        code = full if full is not None or not isinstance(failure, OSError) else failure.errno
        if code is None or code < 0 or code in _OF_NETWORK or getattr(failure, "filename", None) is not None:
            raise
        raise _renamed(failure, code, path) from failure


_OF_NETWORK = (
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
"""Errors of a connection, which has no file; those of looking a name up are negative. A timeout may also be NFS's."""

NEED = "to write: "
"""The beginning of a note of an error that tells the size of what could not be written, such as `3.2 KiB`."""


def _shown(num_bytes: int) -> str:
    return f"{num_bytes} bytes" if num_bytes < 1024 else shown_bytes(num_bytes)


def has_need(failure: BaseException) -> bool:
    """Returns whether an error has a note of the size of what could not be written."""
    return any(note.startswith(NEED) for note in getattr(failure, "__notes__", ()))


def _renamed(failure: BaseException, code: int, path: Path) -> OSError:
    """Returns an error of the system about `path`, with the notes of another one."""
    renamed = OSError(code, os.strerror(code), str(path))
    for note in getattr(failure, "__notes__", ()):
        renamed.add_note(note)
    return renamed


def write_file(path: Path, content: bytes) -> None:
    """Writes a file of which no reader looks for half. Raises OSError, with the name of the file."""
    with naming(path, len(content)):
        path.write_bytes(content)


def write_atomically(target: Path, content: bytes | memoryview) -> None:
    """Writes a file atomically: readers see the old content or the new, with several writers and after a crash too.

    Raises OSError with the name of the file: an error of a full disk has none, or that of a file that nobody knows.
    """
    draft = target.with_name(f".{uuid.uuid4().hex}.draft")  # readers look for the target by its name
    with naming(target, len(content)):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as failure:
        with suppress(OSError):
            draft.unlink()
        failure.add_note(f"{NEED}{_shown(len(content))}")
        raise _renamed(failure, failure.errno or errno.EIO, target) from failure


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
        if written:
            failure.add_note(f"{NEED}more than {_shown(written)}")
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
