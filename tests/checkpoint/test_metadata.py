"""The list of a checkpoint's tensors: read as torch reads it, and whatever is planted there, nothing of it is run."""

import contextlib
import io
import os
import pickle
import pickletools
import random
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from dpo.base.errors import RunError
from dpo.checkpoint.metadata import named_files, open_reader, read_metadata
from dpo.distributed.startup import open_world
from tests.support.checkpoints import Payload, read_plainly, save_plainly

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint with tensors of every dtype, and with settings, which are no tensors, as older versions wrote it."""
    folder = tmp_path_factory.mktemp("metadata") / "checkpoint"
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in DTYPES} | {"step": torch.tensor(3.0)}
    with open_world(60):
        save_plainly(folder, {"model": tensors, "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}})
        yield folder


def plant(folder: Path, into: Path, content: bytes | Any) -> Path:
    """A checkpoint with another `.metadata`: its bytes, or what is pickled."""
    into.mkdir(exist_ok=True)
    (into / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return into


def test_tensors_are_as_torch_reads_them(folder: Path) -> None:
    """All that torch's planner and reader look at, without the entries that are no tensors."""
    plain, ours = read_plainly(folder), read_metadata(folder)
    assert any(isinstance(entry, BytesStorageMetadata) for entry in plain.state_dict_metadata.values())
    tensors = {
        name: entry for name, entry in plain.state_dict_metadata.items() if not isinstance(entry, BytesStorageMetadata)
    }
    assert len(tensors) == len(DTYPES) + 1
    assert ours.state_dict_metadata == tensors
    facts = {
        index: (info.relative_path, info.offset, info.length)
        for index, info in plain.storage_data.items()
        if index.fqn in tensors
    }
    assert {index: (info.relative_path, info.offset, info.length) for index, info in ours.storage_data.items()} == facts
    assert named_files(ours) == {"__0_0.distcp"}


def test_what_is_loaded_is_what_was_saved(folder: Path) -> None:
    state = {"model": {str(dtype): torch.zeros(2, 3, dtype=dtype) for dtype in DTYPES} | {"step": torch.tensor(0.0)}}
    dcp.load(state, storage_reader=open_reader(folder))
    for dtype in DTYPES:
        assert torch.equal(state["model"][str(dtype)], torch.ones(2, 3).to(dtype))
    assert state["model"]["step"] == 3


def test_an_entry_that_is_no_tensor_is_never_read(folder: Path, tmp_path: Path) -> None:
    """Asked for by its name it is missing; torch would unpickle it."""
    save_plainly(tmp_path / "planted", {"weight": Payload(tmp_path / "witness")})
    with pytest.raises(BaseException, match="Missing key in checkpoint state_dict: weight"):
        dcp.load({"weight": torch.zeros(2)}, storage_reader=open_reader(tmp_path / "planted"))
    assert not (tmp_path / "witness").exists()
    dcp.load({"weight": torch.zeros(2)}, checkpoint_id=str(tmp_path / "planted"))  # the oracle: torch runs it
    assert (tmp_path / "witness").is_dir()


@pytest.mark.parametrize("field", ["planner_data", "storage_data", "state_dict_metadata", "storage_meta", "version"])
def test_a_payload_in_any_field_is_named_and_not_run(folder: Path, tmp_path: Path, field: str) -> None:
    metadata = replace(read_plainly(folder), **{field: Payload(tmp_path / "witness")})
    planted = plant(folder, tmp_path / "planted", metadata)
    with pytest.raises(RunError, match=rf"planted/\.metadata: it asks for {os.name}\.mkdir, which no checkpoint needs"):
        read_metadata(planted)
    assert not (tmp_path / "witness").exists()


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text_of(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def name_of(module: str, name: str) -> bytes:
    """A name in protocol 4, which torch writes."""
    return text_of(module) + text_of(name) + b"\x93"


META = "torch.distributed.checkpoint.metadata"

FOREIGN = {
    "a global of protocol 0": global_("os", "system") + b"(S'true'\ntR.",
    "an instance of protocol 0": b"(S'true'\nios\nsystem\n.",
    "a name with dots": b"\x80\x04\x8c\x05torch\x8c\x0aSize.count\x93.",
    "a module of torch": global_("torch", "os") + b".",
    "a function of torch": global_("torch", "load") + b".",
    "a private function of torch": global_("torch.serialization", "_load") + b".",
    "a builtin": global_("builtins", "eval") + b".",
    "a number of copyreg": b"\x80\x02\x82\x01.",
    "a persistent name": b"Pname\n.",
    "nothing": b"",
    "no pickle": b"{}",
    "half": b"\x80\x04\x95\xff\xff",
    "a number": pickle.dumps(3),
    "a list": pickle.dumps([]),
    "a line after its end": b"\x80\x04N.\n",
    "its own list": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_what_is_not_metadata_is_refused_in_one_line(folder: Path, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(RunError, match=r"^[^\n]*planted/\.metadata[^\n]*$"):
        read_metadata(plant(folder, tmp_path / "planted", content))


ASKED = [
    ("torch", "os"),
    ("torch", "load"),
    ("torch", "Tensor"),
    ("torch.serialization", "load"),
    ("torch.distributed.checkpoint.metadata", "os"),
    ("torch.distributed.checkpoint.filesystem", "pickle"),
    ("pathlib", "os"),
    ("pathlib", "Path"),
    ("builtins", "eval"),
    ("builtins", "tuple"),
]
"""Names beside those that are known, in their modules too."""


@pytest.mark.parametrize("module, name", ASKED)
def test_no_other_name_is_looked_up(folder: Path, tmp_path: Path, module: str, name: str) -> None:
    planted = plant(folder, tmp_path / "planted", b"\x80\x04" + name_of(module, name) + b".")
    with pytest.raises(RunError, match=rf"planted/\.metadata: it asks for {re.escape(module)}\.{name}, which no"):
        read_metadata(planted)


def test_an_opcode_that_takes_memory_is_refused(folder: Path, tmp_path: Path) -> None:
    """Five bytes put the 2,000,000,000th note: Python's reader in C makes room for all of them."""
    content = b"\x80\x04}r" + struct.pack("<I", 2_000_000_000) + b"."
    with pytest.raises(RunError, match=OPCODES):
        read_metadata(plant(folder, tmp_path / "planted", content))


OPCODES = r"planted/\.metadata: it is no pickle of opcodes that torch writes; nothing of it was run"
WRITTEN = {
    *("PROTO FRAME MEMOIZE BINGET LONG_BINGET STOP MARK NONE NEWTRUE NEWFALSE".split()),
    *("BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE BINUNICODE".split()),
    *("EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS".split()),
    *("STACK_GLOBAL NEWOBJ REDUCE BUILD".split()),
}
FOREIGN_OPCODES = [op for op in pickletools.opcodes if op.name not in WRITTEN]


@pytest.mark.parametrize("op", FOREIGN_OPCODES, ids=[op.name for op in FOREIGN_OPCODES])
def test_no_other_opcode_is_read(folder: Path, tmp_path: Path, op: pickletools.OpcodeInfo) -> None:
    """At the beginning, after a text, whose length must be taken for what it is, and between short opcodes."""
    code = op.code.encode("latin-1")
    for before in (b"", text_of("c" * 99), b"N" * 9, b"K" + code, b"X" + struct.pack("<I", 300) + code * 300):
        with pytest.raises(RunError, match=OPCODES):
            read_metadata(plant(folder, tmp_path / "planted", b"\x80\x04" + before + code + b"N."))


def test_the_opcodes_of_damaged_pickles_are_told_as_pickletools_tells_them(folder: Path, tmp_path: Path) -> None:
    """Whatever is read further has only the opcodes above, up to its end."""
    content, refused = (folder / ".metadata").read_bytes(), 0
    for seed in range(500):
        rng = random.Random(seed)
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        names, said = set(), ""
        with contextlib.suppress(ValueError):
            names.update(op.name for op, _, _ in pickletools.genops(bytes(changed)))
        try:
            read_metadata(plant(folder, tmp_path / "planted", bytes(changed)))
        except RunError as failure:
            said = str(failure)
        refused += bool(re.search(OPCODES, said))
        assert re.search(OPCODES, said) or names <= WRITTEN, seed
    assert refused > 20


def test_no_class_of_this_process_is_changed(folder: Path, tmp_path: Path) -> None:
    """BUILD with a second part of its state sets attributes of anything, classes too: here of what stands for them."""
    before = {name: dict(vars(getattr(dcp.metadata, name))) for name in ("Metadata", "MetadataIndex")}
    parts = [
        name_of(META, name) + b"N}" + text_of("__init__") + name_of("torch", "Size") + b"s\x86b" for name in before
    ]
    build = b"\x80\x04" + b"".join(parts)
    planted = plant(folder, tmp_path / "planted", build + b"N.")
    with pytest.raises(RunError, match=r"not Metadata with state_dict_metadata"):
        read_metadata(planted)
    assert {name: dict(vars(getattr(dcp.metadata, name))) for name in before} == before
    assert read_metadata(folder).state_dict_metadata  # the next file is read by stand-ins of its own
    pickle.loads(build + b"N.")  # the oracle: a plain reader lets it through
    assert Metadata.__init__ is torch.Size
    for name, members in before.items():
        getattr(dcp.metadata, name).__init__ = members["__init__"]


OUTSIDE = ["../outside", "/etc/passwd", "a/b", "..", "", ".", "a\\b", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_place_outside_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    metadata = read_plainly(folder)
    for info in metadata.storage_data.values():
        info.relative_path = name
    with pytest.raises(RunError, match=r"\.metadata: .*is not the name of a file of a checkpoint"):
        read_metadata(plant(folder, tmp_path / "planted", metadata))


WRONG: dict[str, Any] = {
    "a negative offset": ("place", "offset", -1),
    "a length of words": ("place", "length", "long"),
    "a transform": ("place", "transform_descriptors", ["zstd"]),
    "a size of words": ("tensor", "size", ("1",)),
    "a size below 0": ("tensor", "size", torch.Size([2]) and (-1,)),
    "chunks that are none": ("tensor", "chunks", [3]),
    "no chunks": ("tensor", "chunks", None),
    "chunks that are not all": ("tensor", "chunks", []),
    "no dtype": ("properties", "dtype", "float32"),
}


@pytest.mark.parametrize("which, field, value", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_field_is_refused(folder: Path, tmp_path: Path, which: str, field: str, value: Any) -> None:
    metadata = read_plainly(folder)
    index = next(index for index in metadata.storage_data if index.fqn == "model.torch.float32")
    tensor = metadata.state_dict_metadata[index.fqn]
    owner = {"place": metadata.storage_data[index], "tensor": tensor, "properties": tensor.properties}[which]
    setattr(owner, field, value)
    with pytest.raises(RunError, match=r"planted/\.metadata: "):
        read_metadata(plant(folder, tmp_path / "planted", metadata))


@pytest.mark.parametrize("which", ["size", "number"])
def test_a_text_that_doubles_with_each_level_is_not_made(folder: Path, tmp_path: Path, which: str) -> None:
    """A tuple of twice the same tuple, 60 levels deep: a few hundred bytes, whose text has 2^60 brackets."""
    deep: Any = ()
    for _ in range(60):
        deep = (deep, deep)
    metadata = read_plainly(folder)
    index = next(index for index in metadata.storage_data if index.fqn == "model.torch.float32")
    if which == "size":
        metadata.state_dict_metadata[index.fqn].size = deep
    else:
        object.__setattr__(index, "index", deep)
    with pytest.raises(RunError, match=r"^[^\n]{,300}$"):
        read_metadata(plant(folder, tmp_path / "planted", metadata))


def test_the_names_of_other_pythons_are_known(folder: Path, tmp_path: Path) -> None:
    """Python 3.13 pickles paths as those of pathlib._local; the path that torch notes is not looked at."""
    content = (folder / ".metadata").read_bytes()
    assert b"pathlib" in content
    (position,) = [at for op, value, at in pickletools.genops(content) if value == "pathlib"]
    assert content[position : position + 2] == b"\x8c\x07"
    local = content[:position] + b"\x8c\x0epathlib._local" + content[position + 9 :]
    start = local.index(b"\x95") + 1  # the first frame grew by seven bytes, if it has the name
    length = struct.unpack("<Q", local[start : start + 8])[0]
    if position < start + 8 + length:
        local = local[:start] + struct.pack("<Q", length + 7) + local[start + 8 :]
    assert read_metadata(plant(folder, tmp_path / "local", local)).state_dict_metadata
    names = {value for _, value, _ in pickletools.genops(io.BytesIO(local)) if isinstance(value, str)}
    assert "pathlib._local" in names


def test_the_index_of_a_part_is_a_number(folder: Path, tmp_path: Path) -> None:
    metadata = read_plainly(folder)
    index = next(index for index in metadata.storage_data if index.fqn == "model.torch.float32")
    metadata.storage_data[MetadataIndex(index.fqn, index.offset, "first")] = metadata.storage_data.pop(index)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="'first' is not the number of a part"):
        read_metadata(plant(folder, tmp_path / "planted", metadata))


def test_of_250_flips_none_is_more_than_a_line(folder: Path, tmp_path: Path) -> None:
    """Their hash is not compared here: a reader that gets this far reads what is left, or says in one line why not."""
    content, lines = (folder / ".metadata").read_bytes(), []
    for seed in range(250):
        rng = random.Random(seed)
        changed = bytearray(content[: rng.randrange(1, len(content))] if seed % 5 == 0 else content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        try:
            read_metadata(plant(folder, tmp_path / "planted", bytes(changed)))
        except RunError as failure:
            lines.append(str(failure))
    assert len(lines) > 100
    assert all("planted/.metadata" in line and "\n" not in line for line in lines)
