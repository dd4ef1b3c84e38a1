"""Which failure was the first: that of the rank to blame, not those of the ranks that lost it.

torchrun blames whom it saw first, on its own node; a rank that only lost its peer is often that one.
"""

import json
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dpo.base.command import EXIT_CODES
from dpo.base.errors import UserError

_LOST_PEER = re.compile(
    r"gloo/transport/|Connection closed by peer|Connection reset by peer|Broken pipe"
    r"|^Dist(Backend|Network|Store)Error|ncclRemoteError|NCCL communicator was aborted|^SignalException"
)
"""What a rank says that only lost another one, or waited for it in vain; and torchrun, when it was ended itself."""

_BROKEN_MACHINE = re.compile(
    r"uncorrectable (ECC|NVLink)|fallen off the bus|GPU is lost|no CUDA-capable device|Stale file handle", re.IGNORECASE
)
"""What a rank says whose GPU or file server is gone: on another node, or a little later, it would go on."""

_TRACEBACK = re.compile(
    r"^Traceback \(most recent call last\):\n(?: .*\n|\n)*(?P<last>\w[\w.]*: .*|\w+)$", re.MULTILINE
)
"""On stderr, with its last line."""

_TABLE_ROW = re.compile(
    r"^ +time +: (?P<time>\S+)\n +host .*\n +rank +: (?P<rank>\d+) \(local_rank: (?P<local>\d+)\)\n"
    r" +exitcode +: (?P<code>-?\d+)",
    re.MULTILINE,
)
"""A rank in the table that torchrun prints when it fails."""


@dataclass(frozen=True)
class Failure:
    """How one rank ended, or torchrun itself where `rank` is null."""

    host: str
    rank: int | None
    time: float
    """Seconds since 1970."""
    message: str
    """`ValueError: what it said`, or how the process was killed."""
    killed_by: int = 0
    """The signal that ended it; 0: none."""
    traceback: str = ""
    """Of a bug; none of what was told to the user."""
    told: str = ""
    """What the program told its user, in its own words; empty where it has none for this failure."""
    exit_code: int = 1
    """Of the rank: 2 the user's input is wrong, else 1."""

    @property
    def lost_peer(self) -> bool:
        """Whether it only says that another rank is gone."""
        return bool(_LOST_PEER.search(self.message)) or self.killed_by == signal.SIGTERM

    @property
    def blame(self) -> int:
        """0 for what stands for itself; higher for what may be, or surely is, the consequence of another failure.

        NCCL aborts (SIGABRT) ranks that waited too long; torchrun ends (SIGTERM) the neighbours of a rank that failed.
        """
        if self.lost_peer:
            return 3 if self.killed_by else 2
        return 1 if self.killed_by == signal.SIGABRT else 0

    @property
    def is_exception(self) -> bool:
        """Whether the program itself ended, which it would do again, and nothing killed it from outside."""
        return not self.killed_by and not self.lost_peer and not _BROKEN_MACHINE.search(self.message)

    @property
    def is_users(self) -> bool:
        """Whether the user's input is wrong."""
        return self.exit_code == EXIT_CODES[UserError]

    def __str__(self) -> str:
        if self.is_users:
            return self.told
        who = "torchrun" if self.rank is None else f"rank {self.rank}"
        return f"{who} on {self.host}: {self.told or self.message}"


def first_cause(failures: Iterable[Failure]) -> Failure | None:
    """The failure to show: of those that stand for themselves the earliest."""
    return min(failures, key=lambda failure: (failure.blame, failure.time), default=None)


def failures_of_node(log_dir: Path, torchrun_error: Path, stderr: str, host: str, first_rank: int) -> list[Failure]:
    """What torchrun left of its ranks: their error files, and for ranks without one the table on its stderr.

    first_rank: the rank with local rank 0.
    """
    raised = {first_rank + local: path for local, path in _error_files(log_dir)}
    found = [_read_error(path, host, rank) for rank, path in raised.items()]
    words = None if raised else _last_words(stderr)
    found += [failure for failure in _table(stderr, host, words) if failure.rank not in raised]
    if not found and torchrun_error.exists():
        found.append(_read_error(torchrun_error, host, None))
    return found


def _error_files(log_dir: Path) -> Iterator[tuple[int, Path]]:
    """(local rank, file) of each rank that raised."""
    for path in sorted(log_dir.glob("*/attempt_*/*/error.json")):
        yield int(path.parent.name), path


def _read_error(path: Path, host: str, rank: int | None) -> Failure:
    """`dpo.distributed.program` writes the time to the fraction of a second, torchelastic to the second: the file's own
    is finer.
    """
    time = path.stat().st_mtime
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["message"]
    except (ValueError, KeyError):
        return Failure(host, rank, time, f"its error file {path} is not whole")
    if isinstance(told, str):
        return Failure(host, rank, time, told)
    extra = told["extraInfo"]
    stack, ours = extra["py_callstack"], {key: extra[key] for key in ("told", "exit_code") if key in extra}
    traceback = stack if stack.startswith("Traceback") else ""
    return Failure(host, rank, extra.get("seconds", time), told["message"], traceback=traceback, **ours)


def _table(stderr: str, host: str, last_words: str | None) -> Iterator[Failure]:
    """The ranks in torchrun's table."""
    for row in _TABLE_ROW.finditer(stderr):
        code = int(row["code"])
        time = datetime.fromisoformat(row["time"]).timestamp() + 0.999  # cut to a second: it may have been its last ms
        if code < 0:
            how = f"killed by {_signal_name(-code)}, without a Python exception"
            yield Failure(host, int(row["rank"]), time, how, killed_by=-code)
        else:
            yield Failure(host, int(row["rank"]), time, last_words or f"exit code {code}")


def _last_words(stderr: str) -> str | None:
    """Why a rank ended before it could write an error file, a missing library for one: its traceback's last line.

    The ranks' stderr is one stream: whose traceback it is it does not say, but then mostly all have the same.
    """
    found = _TRACEBACK.search(stderr)
    return found["last"] if found else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe(failures: Sequence[Failure]) -> str:
    """The one line about why a job failed."""
    cause = first_cause(failures)
    return str(cause) if cause else "torchrun ended with an error and none of its ranks says why"
