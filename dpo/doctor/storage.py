"""The folders that a run writes: room, and how fast all ranks together write and read there, as with a checkpoint."""

import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import RunError
from dpo.distributed.collectives import all_gather
from dpo.distributed.world import World
from dpo.doctor.parts import Finding, Part, Sizes, Subject, agreed
from dpo.doctor.words import counted, gib, rate
from dpo.estimate.words import shown_seconds

FILE_BYTES = 64 * 2**20
"""A rank's file: long enough to be more than the latency of the file system."""


# --- the run folder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """What one rank measured."""

    folder: str
    free: int
    total: int
    num_checkpoints: int
    """Whole ones that are there already."""
    write_seconds: float
    read_seconds: float


def measure_storage(subject: Subject, world: World) -> Storage:
    """Writes, syncs and reads a file of this rank's own in the run folder, or where that would be made, at the same
    time as all other ranks; it is removed whatever happens.
    """
    folder = agreed(lambda: existing(subject.run_dir))
    with trial_file(folder) as file:
        written = agreed(lambda: write_file(file, FILE_BYTES))
        check_shared(file)
        read = agreed(lambda: read_file(file))
    usage = shutil.disk_usage(folder)
    present = len(list(subject.run_dir.glob("checkpoints/step-??????")))
    return Storage(str(folder), usage.free, usage.total, present, written, read)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there. Raises RunError where that is a file."""
    found = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not found.is_dir():
        raise RunError(f"{found} is a file, not a folder")
    return found


@contextmanager
def trial_file(folder: Path) -> Iterator[Path]:
    """A path that nothing else uses; what is written there is removed."""
    file = folder / f".{uuid.uuid4().hex}.doctor"
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def write_file(file: Path, num_bytes: int) -> float:
    """Seconds until a file of random bytes, which no file system can compress, is on the disk."""
    content = os.urandom(2**20) * (num_bytes // 2**20)
    started = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        view = memoryview(content)
        while view:
            view = view[out.write(view) :]
        os.fsync(out.fileno())
    return time.perf_counter() - started


def check_shared(file: Path) -> None:
    """Raises RunError, on every rank, where any does not see the file that another wrote. Every rank must get here."""
    files = all_gather(file)

    def look() -> None:
        unseen = [rank for rank, other in enumerate(files) if not other.is_file()]
        if unseen:
            raise RunError(f"{file.parent} is not shared: what rank {unseen[0]} writes is not seen by every rank")

    agreed(look)


def read_file(file: Path) -> float:
    """Seconds to read a file that this host's page cache was asked to forget (a server's may still have it)."""
    with file.open("rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while source.read(8 * 2**20):
            pass
        return time.perf_counter() - started


def describe_storage(subject: Subject, found: Sequence[Storage]) -> Finding:
    """Room of the fullest folder beside what a run writes there, and bytes of all ranks over the seconds of the
    slowest.
    """
    least, num_bytes = min(found, key=lambda one: one.free), FILE_BYTES * len(found)
    written = num_bytes / max(one.write_seconds for one in found)
    read = num_bytes / max(one.read_seconds for one in found)
    lines = [f"{least.folder}: {gib(least.free)} of {gib(least.total)} GiB free"]
    problems = []
    if subject.sizes:
        lines.append(_checkpoints(subject.sizes, least.num_checkpoints, written))
        needed = subject.sizes.disk_bytes(least.num_checkpoints)
        if needed > least.free:
            what = f"the run needs {gib(needed)} GiB in {least.folder}, {gib(least.free)} GiB are free"
            problems.append(f"{what}; what helps: a train.run_dir with more room, a smaller checkpoint.keep")
    speed = f"{rate(written)} written and synced, {rate(read)} read, all ranks together"
    lines.append(f"{speed} ({FILE_BYTES >> 20} MiB each)")
    return Finding(STORAGE.name, tuple(lines), problems=tuple(problems))


def _checkpoints(sizes: Sizes, present: int, written: float) -> str:
    """How much a run still writes, why so much, and how long a checkpoint takes at so many bytes a second."""
    keeps = "checkpoint.keep null keeps all" if sizes.keep is None else f"checkpoint.keep {sizes.keep}"
    there = f"; {counted(present, 'checkpoint')} there already" if present else ""
    at_least = "at least " if sizes.keep is None and sizes.num_saves is None else ""
    needed = f"{at_least}{gib(sizes.disk_bytes(present))} GiB"
    each = f"checkpoints of {gib(sizes.checkpoint)} GiB, about {shown_seconds(sizes.checkpoint / written)} each"
    return f"a run needs {needed} there: {each} ({keeps}{there})"


STORAGE = Part(
    "run folder",
    measure_storage,
    describe_storage,
    remedy="a train.run_dir that every rank can write to, with room for checkpoint.keep + 1 checkpoints",
)


# --- the reference cache ---------------------------------------------------------------------------------------------


def measure_cache(subject: Subject, world: World) -> str | None:
    """The folder of the reference cache, or where that would be made: every rank writes there and sees what the others
    write. None where there is no reference.
    """
    if subject.cache_dir is None:
        return None
    cache_dir = subject.cache_dir
    folder = agreed(lambda: existing(cache_dir))
    with trial_file(folder) as file:
        agreed(lambda: write_file(file, 2**20))
        check_shared(file)
    return str(folder)


def describe_cache(subject: Subject, found: Sequence[str | None]) -> Finding:
    """The folder; a row is 24 bytes, so that its room is no question."""
    line = f"{found[0]}: every rank can write there" if found[0] else "none: the loss has no reference"
    return Finding(CACHE.name, (line,))


CACHE = Part(
    "cache",
    measure_cache,
    describe_cache,
    remedy="a reference.cache_dir (or DPO_CACHE) on a disk that every rank can write to and that all nodes share",
)
