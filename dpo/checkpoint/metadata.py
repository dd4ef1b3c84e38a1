"""Reads the .metadata of a checkpoint, which torch writes as a pickle, without calling anything that it names.

A pickle names classes and functions, which are called while it is read. Here every name that torch writes stands for a
class that does nothing and is made anew for each file, and any other name ends the reading:

    torch.distributed.checkpoint.metadata Metadata    a class with a name, without bases and without methods
    torch.distributed.checkpoint.metadata _MEM_...    the same; what it is called with is dropped
    torch Size                                        tuple
    torch float32                                     the dtype
    posix system                                      RunError

So a file calls no function and changes no class of this process: whatever it does to the stand-ins is gone with them.
Afterwards each field is checked, and torch's own objects are made from it.

Entries that are not tensors are dropped: torch would unpickle them from the shards, with any name. Checkpoints of older
versions have some, the settings of the optimizer, which are those of the config in any case.
"""

import io
import math
import pickle
import re
import reprlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dpo.base.errors import InvalidValue, RunError, one_line
from dpo.base.files import naming
from dpo.base.sums import is_plain_name
from dpo.checkpoint.marker import METADATA

_KEPT = ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex")
_DROPPED = ("BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")
_NAMES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (*_KEPT, *_DROPPED)),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
"""(module, name) of what torch 2.11 to 2.14 writes, besides torch.Size and the dtypes."""


class Place(NamedTuple):
    """Where an item lies: what torch's reader wants to know of it."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


class PlainReader(FileSystemReader):
    """torch's reader of a checkpoint, for metadata that was read by `read_metadata`."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self) -> Metadata:
        """Returns the metadata; reads no file. Without torch's further arguments, so that it asks for no other file."""
        return self.metadata


def open_reader(folder: Path) -> PlainReader:
    """Returns a reader of a checkpoint for `dcp.load`. Raises RunError where its metadata is not what torch writes."""
    return PlainReader(folder, read_metadata(folder))


def named_files(metadata: Metadata) -> set[str]:
    """Returns the files in which the tensors of a checkpoint lie."""
    return {place.relative_path for place in metadata.storage_data.values()}


def read_metadata(folder: Path) -> Metadata:
    """Returns the metadata of the tensors of a checkpoint.

    Raises RunError, with file and name, where it names anything that torch does not write, or is damaged; OSError, with
    the path, where it cannot be read.
    """
    path = folder / METADATA
    with naming(path):
        content = path.read_bytes()
    try:
        _check_opcodes(content)
        return _metadata(_Unpickler(content).load())
    except InvalidValue as failure:
        raise RunError(f"{path}: {failure}") from failure
    except Exception as failure:  # a damaged pickle raises nearly any class
        raise RunError(f"{path} is broken: {one_line(f'{type(failure).__name__}: {failure}')}") from failure


_FIXED = {
    0: (
        *("MEMOIZE STOP MARK NONE NEWTRUE NEWFALSE STACK_GLOBAL NEWOBJ REDUCE BUILD".split()),
        *("EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS".split()),
    ),
    1: ("PROTO", "BINGET", "BININT1"),
    2: ("BININT2",),
    4: ("LONG_BINGET", "BININT"),
    8: ("FRAME",),
}
_COUNTED = {1: ("LONG1", "SHORT_BINUNICODE"), 4: ("BINUNICODE",)}
"""What torch's metadata is written with: opcodes by the bytes of their argument, and by those of its length. Of the
others one takes 16 GiB for five bytes (LONG_BINPUT).
"""


def _one_of(names: Sequence[str]) -> bytes:
    return b"[" + b"".join(re.escape(vars(pickle)[name]) for name in names) + b"]"


_RUN = re.compile(
    b"(?:%b)*+" % b"|".join(_one_of(names) + (b".{%d}" % size if size else b"++") for size, names in _FIXED.items())
    + b"(?:%b|\\Z)" % b"|".join(_one_of(names) + b"(.{%d})" % size for size, names in _COUNTED.items()),
    re.DOTALL,
)
"""Opcodes to the next one whose length is counted, which is a group, or to the end."""


def _check_opcodes(content: bytes) -> None:
    """Raises InvalidValue where a pickle has another opcode than torch writes. The reader in C, which is several
    times as fast as that in Python, knows all of them.
    """
    place, end = 0, len(content)
    while place < end:
        found = _RUN.match(content, place)
        if found is None:
            raise InvalidValue("it is no pickle of opcodes that torch writes; nothing of it was run")
        place = found.end()
        if found.lastindex:
            place += int.from_bytes(found[found.lastindex], "little")


class _Unpickler(pickle.Unpickler):
    """Reads a pickle of torch's metadata as stand-ins, once its opcodes were checked."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        methods = {"__init__": _take_anything}
        self.stand_ins: dict[tuple[str, str], type] = {name: type(name[1], (), dict(methods)) for name in _NAMES}
        self.stand_ins["torch", "Size"] = tuple
        properties = self.stand_ins["torch.distributed.checkpoint.metadata", "TensorProperties"]
        properties.__setstate__ = _keep_state  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name. Raises InvalidValue for all others."""
        if (module, name) in self.stand_ins:
            return self.stand_ins[module, name]
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise InvalidValue(f"it asks for {module}.{name}, which no checkpoint needs; nothing of it was run")


def _take_anything(self: Any, *arguments: Any) -> None:
    """Makes a stand-in, whatever it is called with."""


def _keep_state(self: Any, state: Any) -> None:
    self.state = state


# --- what was read, checked ------------------------------------------------------------------------------------------


def _metadata(top: Any) -> Metadata:
    """Returns torch's metadata of the tensors in a stand-in for it. Raises InvalidValue."""
    entries = _field(top, "Metadata", "state_dict_metadata", dict)
    tensors = {
        _name(name): _tensor(entry) for name, entry in entries.items() if not _is_a(entry, "BytesStorageMetadata")
    }
    places = dict(_places(_field(top, "Metadata", "storage_data", dict), tensors))
    return Metadata(dict(tensors), None, places, StorageMeta())


def _places(
    entries: dict[Any, Any], tensors: dict[str, TensorStorageMetadata]
) -> Iterator[tuple[MetadataIndex, Place]]:
    for index, info in entries.items():
        name = _field(index, "MetadataIndex", "fqn", str)
        if name in tensors:
            yield _index(name, index), _place(info)


def _index(name: str, part: Any) -> MetadataIndex:
    offset, number = vars(part).get("offset"), vars(part).get("index")
    if number is not None and type(number) is not int:
        raise InvalidValue(f"{_shown(name)}: {_shown(number)} is not the number of a part")
    return MetadataIndex(name, None if offset is None else _size(offset), number)


def _place(info: Any) -> Place:
    path = _field(info, "_StorageInfo", "relative_path", str)
    offset, length = (_field(info, "_StorageInfo", name, int) for name in ("offset", "length"))
    if not _is_file(path):
        raise InvalidValue(f"{_shown(path)} is not the name of a file of a checkpoint")
    if offset < 0 or length < 0 or vars(info).get("transform_descriptors"):
        raise InvalidValue(f"{path}: {offset}, {length} is no place in it")
    return Place(path, offset, length)


_is_file = lru_cache(is_plain_name)
"""A checkpoint has many more places than files."""


def _tensor(entry: Any) -> TensorStorageMetadata:
    state = _field(_field(entry, "TensorStorageMetadata", "properties"), "TensorProperties", "state", tuple)
    if not state or not isinstance(state[0], torch.dtype):
        raise InvalidValue("a tensor without a dtype")
    chunks = [
        ChunkStorageMetadata(*(_size(_field(chunk, "ChunkStorageMetadata", name)) for name in ("offsets", "sizes")))
        for chunk in _field(entry, "TensorStorageMetadata", "chunks", list)
    ]
    size = _size(_field(entry, "TensorStorageMetadata", "size"))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):  # torch would load the others alone
        raise InvalidValue(f"the parts of a tensor of size {tuple(size)} are not all of it")
    return TensorStorageMetadata(TensorProperties(dtype=state[0]), size, chunks)


def _size(value: Any) -> torch.Size:
    if type(value) is not tuple or not {*map(type, value)} <= {int} or min(value, default=0) < 0:
        raise InvalidValue(f"{_shown(value)} is not the size of a tensor")
    return torch.Size(value)


def _shown(value: Any) -> str:
    """Returns a value as a short text, made of its first levels alone: tuples that share parts may have a text of any
    length.
    """
    return reprlib.repr(value)[:80]


def _name(value: Any) -> str:
    if type(value) is not str:
        raise InvalidValue(f"{_shown(value)} is not the name of a tensor")
    return value


def _is_a(part: Any, kind: str) -> bool:
    return type(part).__name__ == kind


def _field(part: Any, kind: str, name: str, wanted: type | None = None) -> Any:
    """Returns a field of a stand-in of a kind, of the type that is wanted. Raises InvalidValue where it is another."""
    value = vars(part).get(name) if _is_a(part, kind) else None
    if value is None or (wanted is not None and type(value) is not wanted):
        raise InvalidValue(f"not {kind} with {name}")
    return value
