"""TensorBoard's event files as bytes on a disk: opened, appended to, and freed of what a resumed run gives up.

A file is a sequence of records: 8 bytes length, 4 bytes checksum, an `Event`, 4 bytes checksum. Readers go through the
files of a folder in the order of their names.
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

from dpo.base.console import warn
from dpo.base.files import write_atomically

PREFIX = "events.out.tfevents"


def open_events(folder: Path, first_step: int) -> BinaryIO:
    """A new file that comes after the folder's others, for points from `first_step` on.

    The number in its name is the time, unless that is not later than in all others: a requeued job's other host, or a
    quick restart, does not promise it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name.split(".")[3]) for path in event_files(folder)]
    number = max([int(time.time()), *(last + 1 for last in taken)])
    file = (folder / f"{PREFIX}.{number:010d}.{socket.gethostname()}").open("xb")
    write_event(file, Event(file_version="brain.Event:2"))
    # A TensorBoard that is open, and has read what `drop_points` removes, forgets it at a START.
    write_event(file, Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
    file.flush()
    return file


def write_event(file: BinaryIO, event: Event) -> None:
    """Appends an event, with the time of now."""
    event.wall_time = time.time()
    RecordWriter(file).write(event.SerializeToString())


def write_events_atomically(path: Path, events: Sequence[Event]) -> None:
    """A whole file, in place of an earlier one."""
    buffer = io.BytesIO()
    for event in events:
        write_event(buffer, event)
    write_atomically(path, buffer.getvalue())


def event_files(folder: Path) -> list[Path]:
    """The event files in a folder and below, those that this module names, in the order of their names."""
    return sorted(path for path in folder.rglob(f"{PREFIX}.*") if path.name.split(".")[3].isdigit())


def drop_points(path: Path, first_step: int) -> None:
    """Removes the events of steps at or after `first_step` from a file, in one atomic replacement.

    Of a damaged file what can be read stays, and a copy of all of it under a name that TensorBoard does not look for.
    """
    data, kept = path.read_bytes(), []
    try:
        for record, event in records(data):
            if event.step < first_step:
                kept.append(record)
    except (Damaged, DecodeError):
        copy = path.with_name(path.name.replace("tfevents", "damaged"))
        warn(f"{path} is damaged: its charts go on from what can be read; the file as it was is {copy}")
        write_atomically(copy, data)
    if sum(map(len, kept)) < len(data):
        write_atomically(path, b"".join(kept))


class Damaged(ValueError):
    """A record's length is not what it was when it was written."""


def records(data: bytes) -> Iterator[tuple[bytes, Event]]:
    """The records of a file, each with its event; one at the end that a crash has cut off is left out.

    Raises Damaged, or protobuf's DecodeError, at the first one that cannot be read.
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
