"""The run folder: room, and how fast all ranks together write and read there, as they do with a checkpoint."""

import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.distributed import World
from dpo.doctor.parts import Finding, Part, Subject, agreed
from dpo.doctor.words import gib, rate
from dpo.errors import RunError

FILE_BYTES = 64 * 2**20
"""A rank's file: long enough to be more than the latency of the file system."""


@dataclass(frozen=True)
class Storage:
    """What one rank measured."""

    folder: str
    free: int
    total: int
    write_seconds: float
    read_seconds: float


def measure_storage(subject: Subject, world: World) -> Storage:
    """Writes, syncs and reads a file of this rank's own in the run folder, or where that would be made, at the same
    time as all other ranks; it is removed whatever happens.
    """
    folder = agreed(lambda: existing(subject.run_dir))
    file = folder / f".{uuid.uuid4().hex}.doctor"
    try:
        written = agreed(lambda: write_file(file, FILE_BYTES))
        read = agreed(lambda: read_file(file))
    finally:
        file.unlink(missing_ok=True)
    usage = shutil.disk_usage(folder)
    return Storage(str(folder), usage.free, usage.total, written, read)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there. Raises RunError where that is a file."""
    found = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not found.is_dir():
        raise RunError(f"{found} is a file, not a folder")
    return found


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


def read_file(file: Path) -> float:
    """Seconds to read a file that this host's page cache was asked to forget (a server's may still have it)."""
    with file.open("rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while source.read(8 * 2**20):
            pass
        return time.perf_counter() - started


def describe_storage(subject: Subject, found: Sequence[Storage]) -> Finding:
    """Room of the fullest folder, and bytes of all ranks over the seconds of the slowest."""
    least, num_bytes = min(found, key=lambda one: one.free), FILE_BYTES * len(found)
    written = num_bytes / max(one.write_seconds for one in found)
    read = num_bytes / max(one.read_seconds for one in found)
    speed = f"{rate(written)} written and synced, {rate(read)} read, all ranks together"
    room = f"{gib(least.free)} of {gib(least.total)} GiB free"
    return Finding(STORAGE.name, (f"{least.folder}: {room}", f"{speed} ({FILE_BYTES >> 20} MiB each)"))


STORAGE = Part(
    "run folder",
    measure_storage,
    describe_storage,
    remedy="a train.run_dir that every rank can write to, with room for checkpoint.keep + 1 checkpoints",
)
