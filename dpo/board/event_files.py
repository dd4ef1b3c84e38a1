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

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter

from dpo.files import write_atomically

PREFIX = "events.out.tfevents"


def open_events(folder: Path, first_step: int) -> BinaryIO:
    """A new file that comes after the folder's others, for points from `first_step` on.

    The number in its name is the time, unless that is not later than in all others: a requeued job's other host, or a
    quick restart, does not promise it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name.split(".")[3]) for path in folder.glob(f"{PREFIX}.*")]
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


def drop_points(path: Path, first_step: int) -> None:
    """Removes the events of steps at or after `first_step` from a file, in one atomic replacement."""
    data = path.read_bytes()
    kept = b"".join(record for record, event in records(data) if event.step < first_step)
    if len(kept) < len(data):
        write_atomically(path, kept)


def records(data: bytes) -> Iterator[tuple[bytes, Event]]:
    """The records of a file, each with its event; one at the end that a crash has cut off is left out."""
    begin = 0
    while begin + 12 <= len(data):
        end = begin + 12 + struct.unpack_from("<Q", data, begin)[0] + 4
        if end > len(data):
            return
        yield data[begin:end], Event.FromString(data[begin + 12 : end - 4])
        begin = end
