"""Tells a write that failed for want of room from other failures, also where a library has dropped the system's error.

OSError 28, 122, 27                                 the disk is full, a quota is used up, a file is too large
OSError: 1000 requested and 128 written             numpy's `tofile`
OSError: Not enough disk space. Needed: ...         `datasets`, before it writes; no error of the system
SafetensorError: ... (os error 28)                  a library in Rust
sqlite3.OperationalError: database or disk is full
"""

import errno
import re
from collections.abc import Mapping

from dpo.base.errors import RunError, UserError

CAUSES: Mapping[int, str] = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "a quota is used up",
    errno.EFBIG: "a file is too large",
}
"""Errors of a full file system, of a quota that is used up, and of the limits on the size of a file, in words."""

_WORDS: Mapping[str, int] = {
    r"\d+ requested and \d+ written": errno.ENOSPC,
    r"Not enough disk space": errno.ENOSPC,
    r"No space left on device|\(os error 28\)": errno.ENOSPC,
    r"database or disk is full": errno.ENOSPC,
    r"Disk quota exceeded|\(os error 122\)": errno.EDQUOT,
    r"File too large|\(os error 27\)": errno.EFBIG,
}
"""Messages of libraries -> error of the system. The system's own words are in errors of arrow and of PyTorch."""


def full_code(failure: BaseException) -> int | None:
    """Returns the key of CAUSES that made a write fail; None where it failed for another reason, and for an error that
    has its words for the user already, as NCCL's of /dev/shm, which is memory.
    """
    if isinstance(failure, (UserError, RunError)) or str(failure).startswith("NCCL error"):
        return None
    if isinstance(failure, OSError) and failure.errno is not None:
        return failure.errno if failure.errno in CAUSES else None
    return next((code for words, code in _WORDS.items() if re.search(words, str(failure))), None)
