"""Finds out whether files of a size fit in a folder before they are written, quotas included.

`shutil.disk_usage` does not know quotas: on a file system with 900 TB free a user may have 10 GB. fallocate(2) does: it
reserves blocks as a write would, without writing. It is called directly, since `os.posix_fallocate` writes a byte into
each block where the file system has no fallocate.
"""

import ctypes
import errno
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dpo.base.files import NEED, nearest_existing
from dpo.base.units import shown_bytes

CAUSES = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "a quota is used up"}
"""Errors of a full file system, and of a quota that is used up, in words."""

UNKNOWN = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.EPERM, errno.EFBIG)
"""Errors of fallocate that do not tell whether there is room: the file system or a sandbox has no fallocate, or files
are limited in size."""

PIECE = 64 * 2**30
"""Bytes that are reserved in one file. A file system such as Lustre puts each file on one server, where a file of a
whole run might not fit though its checkpoints, which are many files, do."""


@dataclass(frozen=True)
class Shortage:
    """Describes bytes that do not fit in a folder."""

    folder: Path
    needed: int
    free: int
    """Bytes that the file system has free by `shutil.disk_usage`."""
    is_quota: bool

    @property
    def cause(self) -> str:
        """Returns `the disk is full`, or the same of a quota."""
        return CAUSES[errno.EDQUOT if self.is_quota else errno.ENOSPC]

    @property
    def room(self) -> str:
        """Returns the room that there is: `3.2 GiB are free there`."""
        free = f"{shown_bytes(self.free)} are free there"
        return f"{free}, but a quota of the user, the group or the folder allows less" if self.is_quota else free

    def message(self, what: str) -> str:
        """Returns the whole as a line; `what` are the files, such as `a checkpoint`."""
        return f"{self.cause}: {what} of {shown_bytes(self.needed)} does not fit in {self.folder}: {self.room}"


def find_shortage(folder: Path, num_bytes: int) -> Shortage | None:
    """Returns None where files of `num_bytes` in all fit in a folder; otherwise what is missing. Leaves no file.

    The bytes are reserved and released at once. Where the file system cannot reserve, `shutil.disk_usage` decides.

    Args:
        folder: the folder, which need not exist: its nearest parent that exists is looked at.
        num_bytes: the bytes of the files.

    Raises:
        OSError: no file can be made in the folder.
    """
    present, refusal = nearest_existing(folder), None
    try:
        _reserve(present, num_bytes)
    except OSError as failure:
        if failure.errno not in (*CAUSES, *UNKNOWN):
            raise
        refusal = failure.errno
    free = shutil.disk_usage(present).free
    if refusal in CAUSES or (refusal is not None and num_bytes > free):
        return Shortage(folder, num_bytes, free, refusal == errno.EDQUOT or free >= num_bytes)
    return None


def describe_full(failure: OSError, path: Path | None = None) -> str | None:
    """Returns a line for the error of a write to a full disk or over a quota; None for any other error.

    Args:
        failure: the error.
        path: the file or folder that could not be written; None: the one that the error names.
    """
    if failure.errno not in CAUSES:
        return None
    named = path or (Path(os.fsdecode(failure.filename)) if isinstance(failure.filename, str | bytes) else None)
    place = f": cannot write {named}{_size(failure)}{free_room(named)}" if named else ""
    return CAUSES[failure.errno] + place


def _size(failure: OSError) -> str:
    """Returns `, 3.2 KiB`, the size of what could not be written; nothing where no one knew it (see `files.naming`)."""
    sizes = [note.removeprefix(NEED) for note in getattr(failure, "__notes__", ()) if note.startswith(NEED)]
    return f", {sizes[0]}" if sizes else ""


def free_room(path: Path) -> str:
    """Returns `: 3.2 GiB are free there`; nothing where the file system does not answer."""
    try:
        return f": {shown_bytes(shutil.disk_usage(nearest_existing(path)).free)} are free there"
    except OSError:
        return ""


def _reserve(folder: Path, num_bytes: int) -> None:
    """Reserves bytes in files without a name, which a crash cannot leave behind, and releases them. Raises OSError."""
    with ExitStack() as stack:
        files = []
        for begin in range(0, num_bytes, PIECE):
            files.append(stack.enter_context(tempfile.TemporaryFile(dir=folder, prefix=".reserved-")))
            _fallocate(files[-1].fileno(), min(PIECE, num_bytes - begin))
        for file in files:  # XFS releases the blocks of a closed file later
            file.truncate(0)


def _fallocate(descriptor: int, num_bytes: int) -> None:
    """Calls Linux's fallocate(2), again where a signal interrupted it. Raises OSError; where the C library has no such
    function, with ENOSYS.
    """
    library = ctypes.CDLL(None, use_errno=True)
    code = errno.EINTR if hasattr(library, "fallocate") else errno.ENOSYS
    while code == errno.EINTR:  # Python runs its handlers of signals in between
        failed = library.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes))
        code = ctypes.get_errno() if failed else 0
    if code:
        raise OSError(code, os.strerror(code))
