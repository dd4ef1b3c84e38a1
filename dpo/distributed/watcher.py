"""The process that watches the ranks of a node: a rank that is stopped runs no code of its own, nor one whose Python
lock is held.

    a rank has given no sign of life for its timeout     its failure is recorded in its error file; SIGKILL
    a rank has failed, or its process is gone            the others have GRACE_SECONDS to end by themselves; SIGKILL
    all ranks have left the run                          the watcher ends, and removes the files of the node

torchrun would ask the other ranks by SIGTERM, which a stopped rank does not take, and wait for 30 seconds. The first
rank of the node starts the watcher (`dpo.distributed.beats`); it is in a session of its own, so that signals for the
ranks do not reach it, and holds none of their descriptors. It imports no torch and is there in 0.1 s.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.command.blame import write_error
from dpo.distributed.causes import Cause, failed, held_up, silent, told, vanished
from dpo.distributed.flight import Flight
from dpo.distributed.slots import LOST, STORE_GONE, Seen, look, still_in

GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.25


def main() -> None:
    """Watches the ranks of a node, whose files are in the folder of the command line, to their end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    folder, watcher = Path(sys.argv[1]), Watcher()
    while still_in(seen := look(folder)):
        watcher.act(seen, (folder / STORE_GONE).exists(), Flight(folder).found)
        time.sleep(_POLL_SECONDS)
    clear(folder)


def clear(folder: Path) -> None:
    """Removes the files of a node."""
    Flight(folder).remove_if_empty()
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Watcher:
    """Ends the ranks of a node that cannot end by themselves."""

    why: str = ""
    """Why the ranks must end; empty while they need not."""
    since: float = 0.0
    """The time from which on they must."""

    def act(self, seen: Sequence[Seen], is_store_gone: bool, dumps: str) -> None:
        """Looks once.

        Args:
            seen: the ranks of the node.
            is_store_gone: whether the torchrun of the first node has ended.
            dumps: where NCCL's last collectives are, in words; empty: nowhere.
        """
        late = silent(seen)
        if late is not None:
            record(late, dumps)
            os.kill(late.rank.pid, signal.SIGKILL)
        if not self.why:
            self.why, self.since = trouble(seen, late, is_store_gone, dumps), time.monotonic()
        if self.why and time.monotonic() - self.since >= GRACE_SECONDS:
            for rank in still_in(seen):
                record_end(rank, self.why)
                os.kill(rank.pid, signal.SIGKILL)


def trouble(seen: Sequence[Seen], late: Cause | None, is_store_gone: bool, dumps: str) -> str:
    """Returns why the ranks that are left wait in vain, after it has recorded the failure of the one they wait for;
    empty where nothing has happened.
    """
    cause = late or failed(seen) or told(seen)
    if cause is not None:
        return str(cause)
    gone = vanished(seen)
    if gone is not None:
        cause = held_up(gone.rank, seen)
        if cause is not None:
            record(cause, dumps)
        return str(cause or gone)
    if is_store_gone:
        return "the torchrun of the first node has ended"
    return "another rank was lost" if any(rank.end == LOST for rank in seen) else ""


def record(cause: Cause, dumps: str = "") -> None:
    """Writes the failure of a rank that cannot write it itself to its error file, unless there is one. It counts from
    the last sign of life on, or from when the rank came to its place: it failed before those that waited for it.
    """
    rank = cause.rank
    words = f"{cause.words}{dumps}"
    extra = {"seconds": time.time() - max(rank.silence, rank.age), "user_line": words, "is_silent": True}
    _write(rank, f"rank {rank.rank} on {rank.host}: {words}", words, extra)


def record_end(rank: Seen, why: str) -> None:
    """Writes to the error file of a rank that it was ended for the sake of another one."""
    words = f"was ended in {rank.place}: {why}"
    _write(rank, f"rank {rank.rank} on {rank.host} {words}", words, {"seconds": time.time(), "is_consequence": True})


def _write(rank: Seen, line: str, message: str, extra: dict[str, object]) -> None:
    path = Path(rank.error_file)
    if rank.error_file and not path.exists():
        write_error(path, message, line, extra)


if __name__ == "__main__":
    main()
