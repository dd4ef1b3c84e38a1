"""Finds out whether files of a size fit in a folder before they are written, quotas included.

`shutil.disk_usage` does not know quotas: on a file system with 900 TB free a user may have 10 GB. fallocate(2) does: it
reserves blocks as a write would, without writing. It is called directly, since `os.posix_fallocate` writes a byte into
each block where the file system has no fallocate.
"""

import ctypes
import errno
import os
import resource
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dpo.base.files import NEED, nearest_existing
from dpo.base.full_disk import CAUSES, full_code
from dpo.base.units import shown_bytes

REFUSALS = (errno.ENOSPC, errno.EDQUOT)
"""Errors of fallocate that tell that there is no room."""

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
        if failure.errno not in (*REFUSALS, *UNKNOWN):
            raise
        refusal = failure.errno
    free = shutil.disk_usage(present).free
    if refusal in REFUSALS or (refusal is not None and num_bytes > free):
        return Shortage(folder, num_bytes, free, refusal == errno.EDQUOT or free >= num_bytes)
    return None


def describe_full(failure: BaseException, path: Path | None = None) -> str | None:
    """Returns a line for a write that failed for want of room (`CAUSES`): the file, the bytes that were needed, those
    that are free; None for any other failure. Where nobody knew the bytes, it was one at least.

    Args:
        failure: the error.
        path: the file or folder that could not be written; None: the one that the error names.
    """
    code = full_code(failure)
    if code is None:
        return None
    named = path or _named(failure)
    needs = [note.removeprefix(NEED) for note in getattr(failure, "__notes__", ()) if note.startswith(NEED)]
    needed = needs[0] if needs else "at least 1 byte"
    return f"{CAUSES[code]}: cannot write {named or 'a file'}, {needed}{free_room(named, code) if named else ''}"


def _named(failure: BaseException) -> Path | None:
    """Returns the file that an error names; of two, as of a copy, the second is written."""
    names = [getattr(failure, name, None) for name in ("filename2", "filename")]
    return next((Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes)), None)


def free_room(path: Path, code: int = errno.ENOSPC) -> str:
    """Returns `: 3.2 GiB are free there`, with the limit that counts where it is not the free bytes; nothing where the
    file system does not answer.

    Args:
        path: a file or folder, which may not exist.
        code: the error of the write, a key of CAUSES.
    """
    try:
        system = os.statvfs(nearest_existing(path))
        free = f": {shown_bytes(shutil.disk_usage(nearest_existing(path)).free)} are free there"
    except OSError:
        return ""
    if code == errno.EFBIG:
        return f"{free}, and {_largest_file()}"
    return f"{free}, and no further file may be made: the inodes are used up" if _lacks_inodes(system) else free


def _lacks_inodes(system: os.statvfs_result) -> bool:
    return system.f_files > 0 and system.f_favail == 0


def _largest_file() -> str:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return "the file system has a limit on the size of a file"
    return f"ulimit -f allows {shown_bytes(limit)} per file"


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
