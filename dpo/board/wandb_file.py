"""Reads the files to which W&B writes a run before it sends it: what they hold is not lost after a crash.

A file has the form of LevelDB's log, with one protobuf `Record` per record. After a header of 7 bytes come blocks of 32
KiB, each with chunks: checksum (4 bytes), length (2), kind (1), content. A record is one chunk of kind 1, or several of
kinds 2, 3, ..., 3, 4. A block ends with zeros where no header fits.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7
WHOLE, LAST = 1, 4


def files_of(folder: Path, run_id: str) -> list[Path]:
    """Returns the files of all starts of a run, the earliest first; W&B can remove those that it has sent.

    Args:
        folder: the folder given to `wandb.init`.
        run_id: the id given to it.
    """
    return sorted(folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb"), key=_time)


def _time(path: Path) -> str:
    """Returns the time in the name of a start's folder, offline-run-TIME-ID or run-TIME-ID."""
    return path.parent.name.split("-")[-2]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file, each with the name of every value."""
    for record in records(path.read_bytes()):
        items = Record.FromString(record).history.item
        if items:
            yield {(item.nested_key[0] if item.nested_key else item.key): _value(item) for item in items}


def _value(item: Any) -> Any:
    return json.loads(item.value_json)


def records(data: bytes) -> Iterator[bytes]:
    """Yields the contents of the records, without a last one that a crash has cut off."""
    begin, record = HEADER, b""
    while begin + HEADER <= len(data):
        left = BLOCK - begin % BLOCK
        if left < HEADER:
            begin += left
            continue
        length, kind = struct.unpack_from("<HB", data, begin + 4)
        record += data[begin + HEADER : begin + HEADER + length]
        begin += HEADER + length
        if kind in (WHOLE, LAST) and begin <= len(data):
            yield record
            record = b""
