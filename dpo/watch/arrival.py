"""The start of a run: each rank waits until all are there. Ranks that do not come are named, and those of this node
killed."""

import json
import os
import signal
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from dpo.base.processes import find_process
from dpo.command.blame import write_error
from dpo.watch.causes import STATES

_TELLING_SECONDS = 10
_SHOWN = 8


class SaidByAnother(ConnectionError):
    """A failure of all ranks that are here, of which another one prints the line."""


def arrive(store: dist.Store, size: int) -> None:
    """Counts this rank in the store, and sets the key `ALL_HERE` once all ranks are counted."""
    if store.add("arrived", 1) == size:
        store.set(ALL_HERE, "")


ALL_HERE = "all"


def await_start(store: dist.Store, rank: int, size: int, seconds: int) -> None:
    """Waits until all ranks have started, also where the last one comes as the wait is over.

    Args:
        store: for this alone.
        rank: of this process.
        size: the number of ranks.
        seconds: after which it gives up, and kills the ranks of this node that are not there: a stopped one would keep
            torchrun waiting.

    Raises:
        ConnectionError: which names the ranks that are not there; on the first rank that is. The others raise
            SaidByAnother.
    """
    store.set(_name(rank), "")
    arrive(store, size)
    try:
        store.wait([ALL_HERE], timedelta(seconds=seconds))
    except dist.DistStoreError as failure:
        missing = _decide_missing(store, size)
        if not missing:
            return
        seen = _end_missing(missing, seconds)
        if min(set(range(size)) - set(missing)) != rank:
            with suppress(dist.DistError):
                store.wait(["told"], timedelta(seconds=_TELLING_SECONDS))
            raise SaidByAnother(_line(rank, size, missing, seen, seconds)) from failure
        store.set("told", "")
        raise ConnectionError(_line(rank, size, missing, seen, seconds)) from failure


def _decide_missing(store: dist.Store, size: int) -> list[int]:
    """Returns the ranks that are not there, as the first rank found that asks: each asks at its own moment, and another
    rank may come in between. Then its line names the same ranks as all others', and one rank prints it.
    """
    found = json.dumps([other for other in range(size) if not store.check([_name(other)])])
    missing: list[int] = json.loads(store.compare_set("missing", "", found))
    return missing


def _name(rank: int) -> str:
    return f"rank {rank}"


def _line(rank: int, size: int, missing: Collection[int], seen: dict[int, str], seconds: int) -> str:
    named = [f"{other} ({seen[other]})" if other in seen else str(other) for other in missing][:_SHOWN]
    more = ", ..." if len(missing) > _SHOWN else ""
    advice = "" if len(seen) == len(missing) else "; their nodes' logs say why"
    what = f"{len(missing)} of {size} ranks did not start within {seconds} seconds"
    return f"rank {rank}: {what}: {', '.join(named)}{more}{advice}"


def _end_missing(missing: Collection[int], seconds: int) -> dict[int, str]:
    """Records the failure of each missing rank whose process is on this node, and kills it. Returns what they did."""
    seen = {}
    for pid, variables in _siblings():
        rank = int(variables.get("RANK", "-1"))
        if rank in missing and variables.get("MASTER_PORT") == os.environ.get("MASTER_PORT"):
            found = find_process(pid)
            seen[rank] = STATES.get(found.state if found else "", "its process is ending")
            _record(rank, variables.get("TORCHELASTIC_ERROR_FILE", ""), seconds, seen[rank])
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return seen


def _record(rank: int, file: str, seconds: int, what: str) -> None:
    words = f"did not start within {seconds} s: {what}"
    if file and not Path(file).exists():
        extra = {"seconds": time.time() - seconds, "user_line": words, "is_silent": True}
        write_error(Path(file), words, f"rank {rank} on {socket.gethostname()}: {words}", extra)


def _siblings() -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the other processes that the parent of this one has started, and their environment variables."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is another user's
            found = find_process(int(path.name))
            if found and found.parent == os.getppid() and int(path.name) != os.getpid():
                pairs = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                yield int(path.name), dict(pair.split("=", 1) for pair in pairs if "=" in pair)
