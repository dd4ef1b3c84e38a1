"""Examines the folders that a run writes to: their free space, and the speed at which all ranks together write and
read, as for a checkpoint.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import RunError
from dpo.base.files import nearest_existing, timed_write
from dpo.base.space import find_shortage
from dpo.base.units import shown_bytes, shown_rate, shown_seconds
from dpo.checkpoint.folders import checkpoints_of
from dpo.disk.sizes import Sizes
from dpo.distributed.collectives import all_gather
from dpo.distributed.world import World
from dpo.doctor.parts import Finding, Part, Subject, agreed, with_remedy
from dpo.doctor.words import counted
from dpo.estimate.words import gib

FILE_BYTES = 64 * 2**20
"""Bytes of each rank's file: enough that the time is not the latency of the file system."""


# --- the run folder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """The measurements of a rank."""

    folder: str
    free: int
    total: int
    num_checkpoints: int
    """Checkpoints that exist already, complete or not."""
    write_seconds: float
    read_seconds: float
    shortage: str = ""
    """On rank 0 the room that there is, where the run's bytes do not fit, quotas included; else empty."""


def measure_storage(subject: Subject, world: World) -> Storage:
    """Writes, syncs and reads a file per rank in the run folder, or in its nearest parent that exists, on all ranks at
    once. Removes the files in any case. Every rank must get here, or the rest hang.
    """
    folder = agreed(lambda: existing(subject.run_dir))
    with trial_file(folder) as file:
        written = agreed(lambda: timed_write(file, FILE_BYTES))
        check_shared(file)
        read = agreed(lambda: read_file(file))
    usage = shutil.disk_usage(folder)
    present = len(checkpoints_of(subject.run_dir))
    # Rank 0 alone: the reservations of several ranks at once would take each other's room.
    shortage = agreed(lambda: _shortage(subject, folder, present) if world.is_main else "")
    return Storage(str(folder), usage.free, usage.total, present, written, read, shortage)


def _shortage(subject: Subject, folder: Path, present: int) -> str:
    """Returns the room in a folder where the run's bytes do not fit; empty where they do, or no model is known."""
    found = find_shortage(folder, subject.sizes.disk_bytes(present)) if subject.sizes else None
    return found.room if found else ""


def existing(folder: Path) -> Path:
    """Returns the folder, or its nearest parent that exists. Raises RunError where that is a file."""
    nearest = nearest_existing(folder)
    if not nearest.is_dir():
        raise RunError(f"{nearest} is a file, not a folder")
    return nearest


@contextmanager
def trial_file(folder: Path) -> Iterator[Path]:
    """Yields a path that nothing else uses, and removes the file afterwards."""
    file = folder / f".{uuid.uuid4().hex}.doctor"
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def check_shared(file: Path) -> None:
    """Raises RunError on every rank where any rank does not see the file of another. Every rank must get here, or the
    rest hang.
    """
    files = all_gather(file)

    def look() -> None:
        unseen = [rank for rank, other in enumerate(files) if not other.is_file()]
        if unseen:
            raise RunError(f"{file.parent} is not shared: not every rank sees a file that rank {unseen[0]} wrote")

    agreed(look)


def read_file(file: Path) -> float:
    """Reads a file that this host's page cache was asked to drop, and returns the seconds. A file server may still
    cache it.
    """
    with file.open("rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while source.read(8 * 2**20):
            pass
        return time.perf_counter() - started


def describe_storage(subject: Subject, ranks: Sequence[Storage]) -> Finding:
    """Returns the free space of the fullest folder beside the bytes that a run writes there, and the speed: the bytes
    of all ranks per second of the slowest.
    """
    least, num_bytes = min(ranks, key=lambda rank: rank.free), FILE_BYTES * len(ranks)
    written = num_bytes / max(rank.write_seconds for rank in ranks)
    read = num_bytes / max(rank.read_seconds for rank in ranks)
    lines = [f"{least.folder}: {gib(least.free)} of {gib(least.total)} GiB free"]
    problems = []
    if subject.sizes:
        lines.append(_checkpoints(subject.sizes, least.num_checkpoints, written))
        needed = subject.sizes.disk_bytes(least.num_checkpoints)
        room = f"{gib(least.free)} GiB are free" if needed > least.free else ranks[0].shortage
        if room:
            shortage = f"the run needs {shown_bytes(needed)} in {least.folder}, {room}"
            problems.append(with_remedy(shortage, "a train.run_dir with more room, a smaller checkpoint.keep"))
    speed = f"{shown_rate(written)} written and synced, {shown_rate(read)} read, all ranks together"
    lines.append(f"{speed} ({FILE_BYTES >> 20} MiB per rank)")
    return Finding(STORAGE.name, tuple(lines), problems=tuple(problems))


def _checkpoints(sizes: Sizes, present: int, written: float) -> str:
    """Returns a line: the bytes that a run still writes, the keys that this follows from, and the seconds of a
    checkpoint at `written` bytes per second.
    """
    keeps = "checkpoint.keep null keeps all" if sizes.keep is None else f"checkpoint.keep {sizes.keep}"
    there = f"; {counted(present, 'checkpoint')} there already" if present else ""
    at_least = "at least " if sizes.keep is None and sizes.num_saves is None else ""
    needed = f"{at_least}{shown_bytes(sizes.disk_bytes(present))}"
    each = f"checkpoints of {shown_bytes(sizes.checkpoint)}, about {shown_seconds(sizes.checkpoint / written)} each"
    return f"a run needs {needed} there: {each} ({keeps}{there})"


STORAGE = Part(
    "run folder",
    measure_storage,
    describe_storage,
    remedy="a train.run_dir that every rank can write to, with room for checkpoint.keep + 1 checkpoints",
)


# --- the reference cache ---------------------------------------------------------------------------------------------


def measure_cache(subject: Subject, world: World) -> str | None:
    """Checks that every rank can write to the folder of the reference cache, or to its nearest parent that exists, and
    sees the files of the others. Returns the folder; None where the loss has no reference. Every rank must get here, or
    the rest hang.
    """
    if subject.cache_dir is None:
        return None
    cache_dir = subject.cache_dir
    folder = agreed(lambda: existing(cache_dir))
    with trial_file(folder) as file:
        agreed(lambda: timed_write(file, 2**20))
        check_shared(file)
    return str(folder)


def describe_cache(subject: Subject, folders: Sequence[str | None]) -> Finding:
    """Returns the folder. A row of the cache is 24 bytes, so its size is not checked."""
    line = f"{folders[0]}: every rank can write there" if folders[0] else "none: the loss has no reference"
    return Finding(CACHE.name, (line,))


CACHE = Part(
    "cache",
    measure_cache,
    describe_cache,
    remedy="a reference.cache_dir (or DPO_CACHE) on a disk that every rank can write to and that all nodes share",
)
