"""The process that watches the ranks of a node: a rank that is stopped runs no code of its own, nor one whose Python
lock is held.

    two looks find a rank without a sign of life for     its failure is recorded in its error file; SIGKILL
    its timeout, a second apart
    a rank has failed, or its process is gone            the others have GRACE_SECONDS to end by themselves; SIGKILL
    all ranks have left the run                          the watcher ends, and removes the files of the node

torchrun would ask the other ranks by SIGTERM, which a stopped rank does not take, and wait for 30 seconds. The first
rank of the node starts the watcher (`dpo.watch.beats`); it is in a session of its own, so that signals for the
ranks do not reach it, and holds none of their descriptors. It imports no torch and is there in 0.1 s.

A node that was paused (`scontrol suspend`, a frozen cgroup, a virtual machine that was moved) goes on with ranks that
have all been silent for as long as it was. The watcher was paused too, and gives them PAUSE_SECONDS for a sign. Where
it was not, it still looks twice.

What the watcher writes may be on a disk that is full, or does not answer: it waits for a write for two seconds at most,
and kills then.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from dpo.command.blame import PLACE_FILE, write_error
from dpo.watch.causes import Cause, failed, held_up, silent, told, vanished
from dpo.watch.flight import Flight
from dpo.watch.slots import ELSEWHERE, END_FILE, IN, LOST, Seen, condemn, look, still_in

GRACE_SECONDS = 5.0
PAUSE_SECONDS = 10.0
"""Between two looks, which are a quarter of a second apart, or eight seconds where a disk does not answer: a pause."""
_POLL_SECONDS = 0.25
_AGAIN_SECONDS = 1.0
_WRITE_SECONDS = 2.0


def main() -> None:
    """Watches the ranks of a node, whose files are in the folder of the command line, to their end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    watcher = Watcher(folder)
    while seen := look(folder):
        watcher.act(seen, _end(folder))
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
    suspects: dict[int, float] = field(default_factory=dict)
    """The ranks that the looks before found silent, and the time of the first such look."""
    looked: float = field(default_factory=time.monotonic)
    """When it looked last."""
    resumed: float = -inf
    """When the last pause of the watcher ended."""
    written: set[int] = field(default_factory=set)
    """The ranks whose places are written."""

    def act(self, seen: Sequence[Seen], end: tuple[int, str] | None) -> None:
        """Looks once.

        Args:
            seen: the ranks of the node.
            end: the rank that is to blame for what happened on another node, and why; None: nothing has.
        """
        self._write_places(seen)
        late = silent(self._silent_again(seen))
        if late is not None:
            self._end(late)
        if not self.why and (cause := late or trouble(seen, end)):
            self.why, self.since = str(cause), time.monotonic()
            if cause is not late and isinstance(cause, Cause) and cause.is_silent:
                self._end(cause)
        if self.why and time.monotonic() - self.since >= GRACE_SECONDS:
            self._end_others(still_in(seen))

    def _silent_again(self, seen: Sequence[Seen]) -> list[Seen]:
        """Returns the ranks that this look finds silent, and all those before it for a second; none soon after a pause,
        which was the ranks' own.
        """
        now, before = time.monotonic(), self.looked
        self.looked = now
        self.resumed = now if now - before >= PAUSE_SECONDS else self.resumed
        is_new = now - self.resumed < PAUSE_SECONDS
        ranks = [rank for rank in still_in(seen) if rank.silence >= rank.limit and not is_new]
        self.suspects = {rank.rank: self.suspects.get(rank.rank, now) for rank in ranks}
        return [rank for rank in ranks if now - self.suspects[rank.rank] >= _AGAIN_SECONDS]

    def _end(self, cause: Cause) -> None:
        """Ends the rank that is to blame."""
        unless_stalled(lambda: condemn(self.folder, cause.rank.rank, cause.words))
        unless_stalled(lambda: record(cause, Flight(self.folder).found))
        _kill(cause.rank)

    def _end_others(self, ranks: Sequence[Seen]) -> None:
        unless_stalled(lambda: record_ends(ranks, self.why))
        for rank in ranks:
            _kill(rank)

    def _write_places(self, seen: Sequence[Seen]) -> None:
        new = [rank for rank in seen if rank.rank not in self.written and rank.end == IN and rank.is_gone]
        self.written |= {rank.rank for rank in new}
        if new:
            unless_stalled(lambda: write_places(new))


def unless_stalled(write: Callable[[], object]) -> None:
    """Writes what a reader would like to know, on a disk that may be full, or not answer; goes on without it after
    _WRITE_SECONDS.
    """

    def attempt() -> None:
        with suppress(OSError):
            write()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_WRITE_SECONDS)


def _kill(rank: Seen) -> None:
    if rank.process != ELSEWHERE:  # else its id is that of an unknown process here
        with suppress(ProcessLookupError, PermissionError):
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
        with suppress(OSError):  # a full disk; torchrun, or `dpo`, has ended and removed its folder
            Path(rank.error_file).with_name(PLACE_FILE).write_text(rank.place, encoding="utf-8")


def record_ends(ranks: Sequence[Seen], why: str) -> None:
    """Writes of each rank that it was ended for the sake of another one."""
    for rank in ranks:
        record_end(rank, why)


def record_end(rank: Seen, why: str) -> None:
    """Writes to the error file of a rank that it was ended for the sake of another one."""
    words = f"was ended in {rank.place}: {why}"
    _write(rank, f"rank {rank.rank} on {rank.host} {words}", words, {"seconds": time.time(), "is_consequence": True})


def _write(rank: Seen, line: str, message: str, extra: dict[str, object]) -> None:
    path = Path(rank.error_file)
    if rank.error_file and path.parent.is_dir() and not path.exists():
        with suppress(OSError):  # a full disk
            write_error(path, message, line, extra)


if __name__ == "__main__":
    main()
