"""Whether files fit in a folder: fallocate decides, and where there is none, the free space."""

import ctypes
import errno
import os
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from dpo.base import space
from dpo.base.space import PIECE, Shortage, describe_full, find_shortage
from dpo.base.units import shown_bytes

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk with 10 GiB free; the sizes that are asked of its fallocate."""
    asked: list[int] = []
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: Usage(100 * GIB, 90 * GIB, 10 * GIB))
    monkeypatch.setattr(space, "_fallocate", lambda descriptor, size: asked.append(size))
    return asked


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(space, "_fallocate", fail)


def test_a_megabyte_fits_here_and_nothing_is_left(tmp_path: Path) -> None:
    """By the fallocate of this machine's C library."""
    assert find_shortage(tmp_path, 2**20) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "needed", "short", "is_quota"),
    [
        (errno.ENOSPC, 20, True, False),
        (errno.ENOSPC, 5, True, True),  # the quota of an XFS project; disk_usage has room
        (errno.EDQUOT, 5, True, True),
        (errno.EDQUOT, 20, True, True),
        (errno.EOPNOTSUPP, 5, False, False),
        (errno.EOPNOTSUPP, 20, True, False),
        (errno.ENOSYS, 20, True, False),
        (errno.EPERM, 5, False, False),
    ],
)
def test_who_decides(
    disk: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    needed: int,
    short: bool,
    is_quota: bool,
) -> None:
    refuse(monkeypatch, code)
    expected = Shortage(tmp_path, needed * GIB, 10 * GIB, is_quota) if short else None
    assert find_shortage(tmp_path, needed * GIB) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_no_shortage(disk: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        find_shortage(tmp_path, GIB)


def test_what_fallocate_grants_fits_whatever_disk_usage_says(disk: list[int], tmp_path: Path) -> None:
    """Root may use blocks that disk_usage does not count. Files have at most 64 GiB."""
    assert find_shortage(tmp_path / "new" / "run", 150 * GIB) is None
    assert disk == [PIECE, PIECE, 22 * GIB]


def test_nothing_is_asked_for_no_bytes(disk: list[int], tmp_path: Path) -> None:
    assert find_shortage(tmp_path, 0) is None
    assert find_shortage(tmp_path, -5) is None
    assert disk == []


@pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "without O_TMPFILE, as on NFS"])
def test_the_file_has_no_name_and_goes_with_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    """A process that is killed while it waits leaves nothing either: nobody else can name the file."""
    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", unnamed)
    found: list[list[Path]] = []
    held: list[int] = []

    def interrupt(descriptor: int, size: int) -> None:
        found.append(list(tmp_path.iterdir()))
        held.append(descriptor)
        raise KeyboardInterrupt

    monkeypatch.setattr(space, "_fallocate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_shortage(tmp_path, 4096)
    assert found == [[]] and list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held[0])


class Library:
    """A C library whose fallocate gives these errors in turn."""

    def __init__(self, *codes: int):
        self.codes = list(codes)
        self.code = 0

    def fallocate(self, descriptor: int, mode: int, offset: Any, size: Any) -> int:
        assert (mode, offset.value, size.value) == (0, 0, 4096)
        self.code = self.codes.pop(0)
        return -1 if self.code else 0


@pytest.mark.parametrize("codes", [(errno.EINTR, errno.EINTR, 0), (errno.EINTR, errno.ENOSPC)])
def test_a_signal_does_not_count(monkeypatch: pytest.MonkeyPatch, codes: tuple[int, ...]) -> None:
    library = Library(*codes)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: library)
    monkeypatch.setattr(ctypes, "get_errno", lambda: library.code)
    if codes[-1]:
        with pytest.raises(OSError, match="No space left on device"):
            space._fallocate(3, 4096)
    else:
        space._fallocate(3, 4096)
    assert library.codes == []


def test_a_c_library_without_fallocate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    with pytest.raises(OSError, match="Function not implemented"):
        space._fallocate(3, 4096)


def test_sentences(tmp_path: Path) -> None:
    full, quota = Shortage(Path("/scratch"), 64 * GIB, 3 * GIB, False), Shortage(Path("/home"), 2**20, GIB, True)
    assert full.message("a checkpoint") == (
        "the disk is full: a checkpoint of 64.0 GiB does not fit in /scratch: 3.0 GiB are free there"
    )
    assert quota.message("a checkpoint") == (
        "a quota is used up: a checkpoint of 1.0 MiB does not fit in /home: 1.0 GiB are free there, but a quota of the "
        "user, the group or the folder allows less"
    )
    assert [shown_bytes(number) for number in (1536 * GIB, 1.5 * GIB, GIB - 1, 0)] == [
        "1,536.0 GiB",
        "1.5 GiB",
        "1,024.0 MiB",
        "0.0 KiB",
    ]


def test_the_error_of_a_write_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a full disk and of a quota, with the file that the error or the caller names; of nothing else."""
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: Usage(100 * GIB, 90 * GIB, 2**20))
    file = tmp_path / "new" / "metrics.jsonl"
    room = f"cannot write {file}, at least 1 byte: 1.0 MiB are free there"
    full, quota = (OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EDQUOT))
    assert describe_full(OSError(errno.ENOSPC, "No space left on device", str(file))) == f"the disk is full: {room}"
    assert describe_full(full, file) == f"the disk is full: {room}"
    assert describe_full(quota, file) == f"a quota is used up: {room}"
    assert describe_full(full) == "the disk is full: cannot write a file, at least 1 byte"
    large, copied = (OSError(errno.EFBIG, "File too large", "here", None, str(file)) for _ in range(2))
    assert (
        describe_full(copied) == f"a file is too large: {room}, and the file system has a limit on the size of a file"
    )
    monkeypatch.setattr(space.resource, "getrlimit", lambda limit: (2**20, 2**30))
    assert describe_full(large) == f"a file is too large: {room}, and ulimit -f allows 1.0 MiB per file"
    assert describe_full(OSError(errno.EIO, os.strerror(errno.EIO), str(file))) is None
    assert describe_full(OSError("2 requested and 1 written")) == describe_full(full)
    assert describe_full(OSError("no number")) is None
