"""The failures of ranks, and which of them to blame for the end of a run.

When a rank fails, the ranks that wait for it fail too ("Connection closed by peer"). torchrun reports the failure that
it saw first on its own node, which is often one of these consequences. Example, with the failures of two nodes:

    rank 3  10:00:02.1  RuntimeError: Connection closed by peer     blame 2: lost a peer
    rank 1  10:00:01.9  killed by SIGKILL                           blame 0: a failure of its own
    rank 0  10:00:02.0  killed by SIGTERM                           blame 3: ended by torchrun

`first_cause` takes the lowest blame, then the earliest time: rank 1. A rank knows better than its message where it says
that it only lost another one, or was ended for another one's sake (`is_consequence`); the watcher of a node writes the
file of a rank that it found silent (`is_silent`).
"""

import json
import re
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import UserError
from dpo.command.exits import EXIT_CODES

_LOST_PEER = re.compile(
    r"gloo/transport/|Connection closed by peer|Connection reset by peer|Broken pipe"
    r"|^Dist(Network|Store)Error|ncclRemoteError|NCCL communicator was aborted|^SignalException"
)
"""Messages of a rank that lost another rank or whose wait for it timed out, and of a torchrun that a signal ended."""

_OWN_OF_BACKEND = re.compile(r"unhandled cuda error|ncclUnhandledCudaError|(Cuda|HIP) failure", re.IGNORECASE)
_LOST_BY_BACKEND = re.compile(
    r"abort|ncclRemoteError|remote pro|timed? ?out|closed by|reset by peer|broken pipe|connection refused",
    re.IGNORECASE,
)
_OF_EVERY_SYSTEM_ERROR = "unexpected exit of a remote peer"


def is_lost_by_backend(message: str) -> bool:
    """Returns whether the message of a DistBackendError says that another rank is lost: NCCL also raises it for a fault
    of the rank's own GPU, memory or disk. `It can be also caused by unexpected exit of a remote peer` stands in each of
    its system errors.
    """
    told = message.replace(_OF_EVERY_SYSTEM_ERROR, "")
    return not _OWN_OF_BACKEND.search(told) and bool(_LOST_BY_BACKEND.search(told))


_BROKEN_MACHINE = re.compile(
    r"uncorrectable (ECC|NVLink)|fallen off the bus|GPU is lost|no CUDA-capable device|Stale file handle", re.IGNORECASE
)
"""Messages of a rank whose GPU or file server is gone. On another node, or later, the same command can succeed."""


@dataclass(frozen=True)
class Failure:
    """The failure of one rank, or of torchrun itself if `rank` is None."""

    host: str
    rank: int | None
    time: float
    """Seconds since 1970."""
    message: str
    """`ValueError: message of the exception`, or how the process was killed."""
    killed_by: int = 0
    """The signal that ended the process; 0: none."""
    traceback: str = ""
    """The traceback of a bug; empty for errors that are meant for the user."""
    told: str = ""
    """The error line that the rank printed; empty for a bug, and where the process was killed."""
    user_line: str = ""
    """The error line that the program printed for the user; empty for a bug."""
    exit_code: int = 1
    """The exit code of the rank: 2 if the input of the user is wrong, else 1."""
    is_silent: bool = False
    """The rank gave no sign of life, or did not come on, and was killed: its machine or its disk may be at fault."""
    is_consequence: bool = False
    """The rank failed because another one did."""
    place: str = ""
    """Where the rank was: `the forward pass of step 4`; empty: not known, or `message` says it."""

    @property
    def lost_peer(self) -> bool:
        """Returns whether this failure is only the consequence of another rank's end."""
        if self.is_silent:
            return False
        if self.message.startswith("DistBackendError"):
            return self.is_consequence or is_lost_by_backend(self.message)
        return self.is_consequence or bool(_LOST_PEER.search(self.message)) or self.killed_by == signal.SIGTERM

    @property
    def blame(self) -> int:
        """Returns how likely this is the consequence of another failure: 0 a failure of its own; 1 SIGABRT, with which
        NCCL aborts ranks that waited too long; 2 a lost peer; 3 SIGTERM, with which torchrun ends the other ranks of
        its node when one has failed.
        """
        if self.lost_peer:
            return 3 if self.killed_by else 2
        return 1 if self.killed_by == signal.SIGABRT else 0

    @property
    def is_exception(self) -> bool:
        """Returns whether the program itself raised, so that a restart would fail again; False if the process was
        killed, fell silent, lost a peer or lost its machine.
        """
        was_ended = self.killed_by or self.is_silent or self.lost_peer
        return not was_ended and not _BROKEN_MACHINE.search(self.message)

    @property
    def is_users(self) -> bool:
        """Returns whether the input of the user is wrong."""
        return self.exit_code == EXIT_CODES[UserError]

    def __str__(self) -> str:
        if self.is_users:
            return self.user_line
        process = "torchrun" if self.rank is None else f"rank {self.rank}"
        place = f", in {self.place}" if self.place else ""
        return f"{process} on {self.host}: {self.user_line or self.message}{place}"


def first_cause(failures: Iterable[Failure]) -> Failure | None:
    """Returns the failure to report: the lowest `blame`, then the earliest; None if there are no failures."""
    return min(failures, key=lambda failure: (failure.blame, failure.time), default=None)


def write_error(path: Path, message: str, details: str, extra: Mapping[str, object]) -> None:
    """Writes the error file of a rank, for torchrun and for `read_error`.

    The file has the form of torch's `torch.distributed.elastic.multiprocessing.errors.record`, with more `extraInfo`:
    seconds         the time with fractions; torch's `timestamp` in whole seconds does not tell the rank that failed
                    first from ranks that lost that rank
    exit_code, user_line, is_silent, is_consequence, place    as in `Failure`

    Args:
        path: the file.
        message: as in `Failure`.
        details: the traceback or the error line; torchrun prints it.
        extra: those of the fields above that are known; `seconds` must be among them.

    Raises OSError where the disk is full; then there is no file.
    """
    info = {"py_callstack": details, "timestamp": str(int(float(str(extra["seconds"]))))} | dict(extra)
    try:
        path.write_text(json.dumps({"message": {"message": message, "extraInfo": info}}), encoding="utf-8")
    except OSError:
        with suppress(OSError):
            path.unlink()  # half a file would be taken for a failure of its own
        raise


_OURS = ("user_line", "exit_code", "is_silent", "is_consequence", "place")
"""Fields of the file that are those of `Failure`, where they are there."""

PLACE_FILE = "place"
"""The name of a file beside a rank's error file: where the rank was, once its process is gone without a word."""
_PLACE_SECONDS = 1.0


def place_of_killed(error_file: Path) -> str:
    """Returns where a rank was whose process is gone: the watcher of its node writes it a moment later. Empty where no
    watcher knew the rank.
    """
    file, end = error_file.with_name(PLACE_FILE), time.monotonic() + _PLACE_SECONDS
    while file.is_file():
        if (place := file.read_text(encoding="utf-8")) or time.monotonic() > end:
            return place
        time.sleep(0.05)
    return ""


def read_error(path: Path, host: str, rank: int | None) -> Failure:
    """Reads a rank's error file. Its time is the `seconds` that `dpo.watch.failures` writes, with fractions; in
    files of torchelastic, which writes whole seconds, the modification time of the file.
    """
    at = path.stat().st_mtime
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
    except (ValueError, KeyError):
        return Failure(host, rank, at, f"its error file {path} is incomplete")
    if isinstance(message, str):
        return Failure(host, rank, at, message)
    extra = message["extraInfo"]
    stack, ours = extra["py_callstack"], {key: extra[key] for key in _OURS if key in extra}
    is_bug = stack.startswith("Traceback")
    shown = {"traceback" if is_bug else "told": stack}
    return Failure(host, rank, extra.get("seconds", at), message["message"], **shown, **ours)
