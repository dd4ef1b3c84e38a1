"""The process that watches the ranks of a node: a rank that is stopped runs no code of its own, nor one whose Python
lock is held.

    a rank has given no sign of life for its timeout     its failure is recorded in its error file; SIGKILL
    a rank has failed, or its process is gone            the others have GRACE_SECONDS to end by themselves; SIGKILL
    all ranks have left the run                          the watcher ends, and removes the files of the node

torchrun would ask the other ranks by SIGTERM, which a stopped rank does not take, and wait for 30 seconds. The first
rank of the node starts the watcher (`dpo.distributed.beats`); it is in a session of its own, so that signals for the
ranks do not reach it, and holds none of their descriptors. It imports no torch and is there in 0.1 s.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpo.command.blame import PLACE_FILE, write_error
from dpo.distributed.causes import Cause, failed, held_up, silent, told, vanished
from dpo.distributed.flight import Flight
from dpo.distributed.slots import END_FILE, IN, LOST, Seen, condemn, look, still_in

GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.25


def main() -> None:
    """Watches the ranks of a node, whose files are in the folder of the command line, to their end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    watcher = Watcher(folder)
    while seen := look(folder):
        watcher.act(seen, _end(folder), Flight(folder).found)
        if not still_in(seen):
            break
        time.sleep(_POLL_SECONDS)
    clear(folder)


def _end(folder: Path) -> tuple[int, str] | None:
    """Returns the rank that is to blame for what happened on another node, and why; None: nothing has."""
    file = folder / END_FILE
    rank, why = json.loads(file.read_text()) if file.exists() else (-1, "")
    return (rank, why) if why else None


def clear(folder: Path) -> None:
    """Removes the files of a node."""
    Flight(folder).remove_if_empty()
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Watcher:
    """Ends the ranks of a node that cannot end by themselves."""

    folder: Path
    """The files of the node."""
    why: str = ""
    """Why the ranks must end; empty while they need not."""
    since: float = 0.0
    """The time from which on they must."""

    def act(self, seen: Sequence[Seen], end: tuple[int, str] | None, dumps: str) -> None:
        """Looks once.

        Args:
            seen: the ranks of the node.
            end: the rank that is to blame for what happened on another node, and why; None: nothing has.
            dumps: where NCCL's last collectives are, in words; empty: nowhere.
        """
        write_places(seen)
        late = silent(seen)
        if late is not None:
            self._end(late, dumps)
        if not self.why and (cause := late or trouble(seen, end)):
            self.why, self.since = str(cause), time.monotonic()
            if cause is not late and isinstance(cause, Cause) and cause.is_silent:
                self._end(cause, dumps)
        if self.why and time.monotonic() - self.since >= GRACE_SECONDS:
            for rank in still_in(seen):
                record_end(rank, self.why)
                _kill(rank)

    def _end(self, cause: Cause, dumps: str) -> None:
        """Ends the rank that is to blame."""
        record(cause, dumps)
        condemn(self.folder, cause.rank.rank, cause.words)
        _kill(cause.rank)


def _kill(rank: Seen) -> None:
    with suppress(ProcessLookupError):
        os.kill(rank.pid, signal.SIGKILL)


def trouble(seen: Sequence[Seen], end: tuple[int, str] | None) -> Cause | str | None:
    """Returns why the ranks that are left wait in vain; None where nothing has happened."""
    if end is not None:
        return next((Cause(rank, end[1], is_silent=True) for rank in still_in(seen) if rank.rank == end[0]), end[1])
    cause = failed(seen) or told(seen) or vanished(seen)
    if cause is not None and cause.rank.end == IN and cause.rank.is_gone:
        return held_up(cause.rank, seen) or cause
    return cause or ("another rank was lost" if any(rank.end == LOST for rank in seen) else None)


def record(cause: Cause, dumps: str = "") -> None:
    """Writes the failure of a rank that cannot write it itself to its error file, unless there is one. It counts from
    the last sign of life on, or from when the rank came to its place: it failed before those that waited for it.
    """
    rank = cause.rank
    words = f"{cause.words}{dumps}"
    extra = {"seconds": time.time() - max(rank.silence, rank.age), "user_line": words, "is_silent": True}
    _write(rank, f"rank {rank.rank} on {rank.host}: {words}", words, extra)


def write_places(seen: Sequence[Seen]) -> None:
    """Writes where the ranks were whose processes are gone without a word."""
    for rank in seen:
        if rank.end == IN and rank.is_gone:
            write_place(rank)


def write_place(rank: Seen) -> None:
    """Tells whoever reports the end of a process that is gone where it was (`command.blame.place_of_killed`)."""
    if rank.error_file:
        with suppress(FileNotFoundError):  # torchrun, or `dpo`, has ended and removed its folder
            Path(rank.error_file).with_name(PLACE_FILE).write_text(rank.place, encoding="utf-8")


def record_end(rank: Seen, why: str) -> None:
    """Writes to the error file of a rank that it was ended for the sake of another one."""
    words = f"was ended in {rank.place}: {why}"
    _write(rank, f"rank {rank.rank} on {rank.host} {words}", words, {"seconds": time.time(), "is_consequence": True})


def _write(rank: Seen, line: str, message: str, extra: dict[str, object]) -> None:
    path = Path(rank.error_file)
    if rank.error_file and path.parent.is_dir() and not path.exists():
        write_error(path, message, line, extra)


if __name__ == "__main__":
    main()
