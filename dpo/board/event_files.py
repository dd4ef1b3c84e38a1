"""TensorBoard's event files: opens them, appends events, removes the points of steps that a resumed run computes again.

A file is a sequence of records: length (8 bytes), checksum (4 bytes), an `Event`, checksum (4 bytes). TensorBoard reads
the files of a folder in the order of their names.
"""

import io
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from dpo.base.files import naming, write_atomically
from dpo.terminal.console import warn

PREFIX = "events.out.tfevents"

SUB_RUNS = ("train", "eval", "train-chosen", "train-rejected", "eval-chosen", "eval-rejected")
"""Folders of event files in RUN/tensorboard until version 0.2."""


def open_events(folder: Path, first_step: int) -> BinaryIO:
    """Creates a file that sorts after all others of the folder, for points from `first_step` on.

    The number in its name is the time in seconds, or one more than the highest number there: a restart within a second,
    or on a host whose clock is behind, would otherwise sort before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name.split(".")[3]) for path in event_files(folder)]
    number = max([int(time.time()), *(last + 1 for last in taken)])
    file = (folder / f"{PREFIX}.{number:010d}.{socket.gethostname()}").open("xb")
    add_event(file, Event(file_version="brain.Event:2"))
    # At a START, an open TensorBoard discards the points that it has read and that `drop_points` removed.
    add_event(file, Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
    return file


def add_event(file: BinaryIO, event: Event) -> None:
    """Appends an event to an event file at once. Raises OSError, with the name of the file."""
    with naming(Path(file.name), event.ByteSize()):
        write_event(file, event)
        file.flush()


def write_event(file: BinaryIO, event: Event) -> None:
    """Appends an event with the current time."""
    event.wall_time = time.time()
    RecordWriter(file).write(event.SerializeToString())


def write_events_atomically(path: Path, events: Sequence[Event]) -> None:
    """Writes a file of these events, or replaces it, in one atomic step."""
    buffer = io.BytesIO()
    for event in events:
        write_event(buffer, event)
    write_atomically(path, buffer.getvalue())


def event_files(folder: Path) -> list[Path]:
    """Returns the event files in a folder whose names this module gave, sorted by name."""
    return sorted(path for path in folder.glob(f"{PREFIX}.*") if path.name.split(".")[3].isdigit())


def put_aside_sub_runs(folder: Path) -> bool:
    """Renames all event files of a run, so that TensorBoard ignores them, where an older version of this package wrote
    them: it had a folder for each color, such as `train` and `eval-chosen`, and TensorBoard would show each as a run.

    Returns whether there were such folders.
    """
    old = [path for name in SUB_RUNS for path in event_files(folder / name)]
    for path in [*old, *event_files(folder)] if old else ():
        path.rename(path.with_name(path.name.replace("tfevents", "old")))
    return bool(old)


def drop_points(path: Path, first_step: int) -> None:
    """Removes the events at steps >= `first_step` from a file, in one atomic replacement.

    From a damaged file the readable events before the damage are kept; a copy of the damaged file gets a name that
    TensorBoard ignores.
    """
    data, kept = path.read_bytes(), []
    try:
        for record, event in records(data):
            if event.step < first_step:
                kept.append(record)
    except (Damaged, DecodeError):
        copy = path.with_name(path.name.replace("tfevents", "damaged"))
        warn(f"{path} is damaged: its charts keep the points before the damage; a copy of the damaged file is {copy}")
        write_atomically(copy, data)
    if sum(map(len, kept)) < len(data):
        write_atomically(path, b"".join(kept))


class Damaged(ValueError):
    """The checksum of a record's length is wrong."""


def records(data: bytes) -> Iterator[tuple[bytes, Event]]:
    """Yields the records of a file, each with its event, without a last record that a crash has cut off.

    Raises Damaged, or protobuf's DecodeError, at the first record that cannot be read.
    """
    begin = 0
    while begin + 12 <= len(data):
        length, checksum = struct.unpack_from("<QI", data, begin)
        if masked_crc32c(data[begin : begin + 8]) != checksum:
            raise Damaged(f"at byte {begin}")
        end = begin + 12 + length + 4
        if end > len(data):
            return
        yield data[begin:end], Event.FromString(data[begin + 12 : end - 4])
        begin = end
