"""The lock of a run folder: one start at a time writes to it; without torch.

    RUN/lock/000001.json    the process that holds the folder (`Holder`), one line of JSON
    RUN/lock/000002.json    the one that takes it over; it removes 000001.json before it writes anything else

A start writes its file under a name of its own and links it to the next number (link(2)), which one of several takers
alone can do, on NFS too. It holds the folder while its file is there, and a thread touches the file every BEAT_SECONDS.
How long ago that was is told by a file that is written now, so by the clock of the file system, not of the hosts.
Another start is refused until the holder has ended or counts as gone (`holder.why_over`). Where the holder may be the
same run before torchrun started it again on another host, the start waits for less than a minute until it knows.

A holder that was stopped may wake up when another has the folder. So it calls `Lock.check` before each line of metrics
and before a checkpoint or a model gets its name, and ends where the folder is not its own any more.
"""

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import FolderLost, UserError
from dpo.base.files import naming
from dpo.run_folder.files import LOCK
from dpo.run_folder.holder import EARLIER_SECONDS, SILENT_SECONDS, Holder, holder_in, may_be_earlier, why_over
from dpo.terminal.console import say

KEY = "train.run_dir"
BEAT_SECONDS = 20.0
_GONE = (errno.ENOENT, errno.ESTALE)
"""Errors for a file that is removed, by this host or, on NFS, by another one."""
_NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
"""Errors of a folder that is read-only, or has a file in its place."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of link(2) on a file system without hard links."""
_TRIES = 1000
"""To write a draft, until an error counts as lasting: for example a file in the place of a folder."""


@dataclass(frozen=True)
class Entry:
    """A file of RUN/lock."""

    path: Path
    holder: Holder | None
    """None where the file does not tell: it is damaged, or being written on a file system without hard links."""
    changed: float
    """The time of the last change, by the file system's clock."""

    def __str__(self) -> str:
        """Returns the holder in words."""
        return str(self.holder) if self.holder else f"a process that {self.path} does not name"


def entries_of(run_dir: Path) -> list[Entry]:
    """Returns the locks of a run folder, the newest last: more than one only while the folder is taken over."""
    return [entry for path in sorted(_paths(run_dir), key=_number) if (entry := _read(path))]


def _paths(run_dir: Path) -> list[Path]:
    """Returns the names of locks that are taken, also by a link that leads nowhere, which is nobody's lock."""
    try:
        return list((run_dir / LOCK).glob("*.json"))
    except FileNotFoundError:  # Python 3.11, where a start that ends removes the folder at this moment
        return []


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() else 0


def _read(path: Path) -> Entry | None:
    """Reads a lock; None where the file is gone. It is opened, so that NFS asks its server how the file is now."""
    try:
        with path.open("rb") as file:
            return Entry(path, holder_in(file.read()), os.fstat(file.fileno()).st_mtime)
    except OSError as failure:
        if failure.errno in _GONE:
            return None
        raise


# --- held ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lock:
    """The lock of a run folder that this process holds."""

    run_dir: Path
    path: Path
    holder: Holder

    def check(self) -> None:
        """Raises FolderLost where another start has taken the folder."""
        if not self.is_own():
            now = f": now it is held by {entries[-1]}" if (entries := entries_of(self.run_dir)) else ""
            why = f"this process was silent for {self.holder.bounds}, or {self.path} was removed"
            raise FolderLost(f"{KEY}: {self.run_dir} is not this run's any more{now}; {why}")

    def is_own(self) -> bool:
        """Returns whether the file is there, and this process's."""
        found = _read(self.path)
        return found is not None and found.holder == self.holder


@contextmanager
def holding(run_dir: Path, me: Holder, seconds: float = BEAT_SECONDS) -> Iterator[Lock]:
    """Holds a run folder during a with-block, which is entered on rank 0 alone. A folder that was made for the lock,
    and has got no other file, is removed again.

    Args:
        run_dir: the run folder, which need not exist.
        me: this process.
        seconds: between two touches of the lock.

    Raises:
        UserError: another start holds the folder.
    """
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        lock = take(run_dir, me)
        try:
            with _beating(lock, seconds):
                yield lock
        finally:
            with suppress(OSError):  # then the next start sees that this process has ended
                if lock.is_own():
                    lock.path.unlink()
    finally:
        for folder in (run_dir / LOCK, *new):
            with suppress(OSError):  # it has files
                folder.rmdir()


@contextmanager
def _beating(lock: Lock, seconds: float) -> Iterator[None]:
    """Touches a lock every `seconds` in a thread, which closes the file that it touches: the call may hang with NFS's
    server. The open file is this process's own, also where another start has made one of the same name.
    """
    descriptor, ended = os.open(lock.path, os.O_WRONLY), threading.Event()

    def beat() -> None:
        while not ended.wait(seconds):
            with suppress(OSError):  # `Lock.check` finds out where it was removed
                os.utime(descriptor)
        os.close(descriptor)

    threading.Thread(target=beat, name="lock of the run folder", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


# --- taken -----------------------------------------------------------------------------------------------------------


def refuse_if_held(run_dir: Path, me: Holder) -> None:
    """Raises UserError where another start holds the folder, or has left a lock and it cannot be written to. Leaves no
    file. A holder that may be this run before torchrun started it again is left to `take`, which watches its lock.
    """
    if entries_of(run_dir):
        with _writing(run_dir), _drafted(run_dir, me) as draft:
            others = [entry for entry in entries_of(run_dir) if not may_be_earlier(entry.holder, me)]
            _reasons(others, [], me, _now(draft))


def take(run_dir: Path, me: Holder) -> Lock:
    """Takes a run folder, and says from whom it is taken over. Raises UserError where another start holds it, or it
    cannot be written to.
    """
    with _writing(run_dir), _drafted(run_dir, me) as draft:
        silent = _watch_earlier(run_dir, me, draft)
        while not (lock := _try_to_take(run_dir, me, draft, silent)):
            continue
        return lock


def _watch_earlier(run_dir: Path, me: Holder, draft: Path) -> list[Entry]:
    """Watches each lock of a holder that may be this run before torchrun started it again on another host, until it is
    touched or the holder is over. Returns those not touched for EARLIER_SECONDS, of which only the time between reads
    counts: after a stall of NFS's server a read may come before the touch of a holder that lives.
    """
    silent = []
    for entry in (entry for entry in entries_of(run_dir) if may_be_earlier(entry.holder, me)):
        say(f"{run_dir} is held by {entry}, maybe this run before torchrun started it again: waiting for its next sign")
        watched = 0.0
        while entry in entries_of(run_dir) and not why_over(entry.holder, me, _now(draft) - entry.changed, watched):
            time.sleep(1.0)
            watched += 1.0
        if watched >= EARLIER_SECONDS:
            silent.append(entry)
    return silent


def _try_to_take(run_dir: Path, me: Holder, draft: Path, silent: Sequence[Entry]) -> Lock | None:
    """Returns the lock; None where another start came in between, of which this one does not know yet."""
    over = entries_of(run_dir)
    reasons = _reasons(over, silent, me, _now(draft))
    target = run_dir / LOCK / f"{max(map(_number, _paths(run_dir)), default=0) + 1:06d}.json"
    if not _link(draft, target, me):
        return None
    if any(entry.path != target and entry not in over for entry in entries_of(run_dir)):
        target.unlink()
        return None
    for entry, reason in zip(over, reasons, strict=True):
        entry.path.unlink(missing_ok=True)
        say(f"{run_dir} is taken over from {entry}: {reason}")
    return Lock(run_dir, target, me)


def _reasons(entries: Sequence[Entry], silent: Sequence[Entry], me: Holder, now: float) -> list[str]:
    """Returns why each holder is over; those of `silent` were watched. Raises UserError for one that is not."""
    reasons = []
    for entry in entries:
        age = now - entry.changed
        reason = why_over(entry.holder, me, age, EARLIER_SECONDS if entry in silent else 0.0)
        if reason is None:
            what = f"{entry.path.parents[1]} is in use by {entry}, last heard of {max(age, 0):.0f} s ago"
            after = f"the same command when that has ended, or {SILENT_SECONDS / 60:.0f} minutes after its last sign"
            raise UserError(KEY, what, f"another folder, or {after}")
        reasons.append(reason)
    return reasons


def _link(draft: Path, target: Path, me: Holder) -> bool:
    """Gives the draft its name; returns whether no other start was first. NFS may say that the name was taken where its
    own first try succeeded: then the file has two names.
    """
    try:
        os.link(draft, target)
    except FileExistsError:
        return draft.stat().st_nlink == 2
    except OSError as failure:
        if failure.errno not in _NO_LINKS:
            raise
        return _write(target, me)
    return True


def _write(path: Path, me: Holder) -> bool:
    """Writes a lock; returns whether there was none of this name. Raises OSError, with the path."""
    try:
        content = me.to_json()
        with naming(path, len(content)), path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    """Raises UserError where the with-block may not write to the run folder."""
    try:
        yield
    except OSError as failure:
        if failure.errno not in _NOT_WRITABLE:
            raise
        what = f"{run_dir}: cannot write to {failure.filename}: {failure.strerror}"
        raise UserError(KEY, what, "a folder to write in") from failure


@contextmanager
def _drafted(run_dir: Path, me: Holder) -> Iterator[Path]:
    """Yields a lock under a name of its own, which is removed at the end. Makes RUN/lock."""
    draft = run_dir / LOCK / f".{me.token}.draft"
    try:
        _write_draft(draft, me)
        yield draft
    finally:
        with suppress(OSError):
            draft.unlink()


def _write_draft(draft: Path, me: Holder) -> None:
    """Writes a draft and makes its folder, again where starts that end at this moment remove a folder on its way:
    mkdir(2) finds it, and it is gone when pathlib asks whether it is a folder, or when the next one is made in it.
    """
    for left in reversed(range(_TRIES)):
        try:
            draft.parent.mkdir(parents=True, exist_ok=True)
            if _write(draft, me):
                return
        except (FileNotFoundError, FileExistsError):
            if not left:
                raise
    raise AssertionError(f"{draft} has a random name, and was there {_TRIES} times")


def _now(draft: Path) -> float:
    """Returns the time by the clock of the file system, which may be that of NFS's server."""
    os.utime(draft)
    return draft.stat().st_mtime
