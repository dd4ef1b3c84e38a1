"""The files of the reference cache: immutable blocks of rows (key of prompt and completion -> log-probability).

    CACHE/<reference key>/about.json            what the key stands for, for people
                          rows-<sha256>.bin     a block; its name is the hash of its bytes
                          made-<sha256>.json    how the block of that name was made (`Making`)
                          table-…               what was made of the blocks for one data set (`ref_table.py`)

A block is written under another name and renamed, never changed: several jobs may read and add at the same time, and a
killed one leaves whole blocks. Which rows belong together is said by the folder's name alone (`reference_key`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo.base.console import say
from dpo.base.files import write_atomically

ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("logp", "<f8")])
"""A row on disk: a 16-byte key as two integers, and the log-probability in nats (float64 holds a float32 exactly)."""

Making = Mapping[str, str | bool]
"""How a block of rows was computed, where this is not part of their key: torch's version, the compute capability (or
"cpu") as `device`, and whether layers were compiled (`compile`)."""


def reference_key(facts: Mapping[str, str]) -> str:
    """The folder name for the facts that decide a row's value: the model by content, and the numerics."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def split_keys(keys: Sequence[bytes]) -> np.ndarray:
    """Keys of 16 bytes as (N, 2) uint64."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)


@dataclass(frozen=True, eq=False)
class RefRows:
    """Reference log-probabilities by key: high (N,) sorted, low (N,), logps (N,) nats."""

    high: np.ndarray
    low: np.ndarray
    logps: np.ndarray

    def __len__(self) -> int:
        return len(self.high)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each of keys (M, 2) among the rows, or -1: (M,)."""
        place = np.searchsorted(self.high, keys[:, 0])
        found = np.full(len(keys), -1)
        open_ = np.ones(len(keys), bool)
        while open_.any():  # once, but for keys that share their first half
            inside = open_ & (place < len(self))
            open_ = np.zeros(len(keys), bool)
            open_[inside] = self.high[place[inside]] == keys[inside, 0]
            hit = open_.copy()
            hit[open_] = self.low[place[open_]] == keys[open_, 1]
            found[hit] = place[hit]
            open_ &= ~hit
            place = place + open_
        return found


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """The places at which the different ones of keys (N, 2) stand first, in the order of the sorted keys."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    first: np.ndarray = order[np.append(True, (np.diff(keys[order], axis=0) != 0).any(1))[: len(keys)]]
    return first


def make_rows(table: np.ndarray) -> RefRows:
    """The rows of a table of dtype ROW, each key once."""
    table = table[first_of_each(np.stack([table["high"], table["low"]], 1))]
    return RefRows(table["high"].copy(), table["low"].copy(), table["logp"].copy())


def block_names(folder: Path) -> list[str]:
    """The blocks in a cache folder."""
    return sorted(path.name for path in folder.glob("rows-*.bin"))


def read_rows(folder: Path) -> RefRows:
    """All rows of a cache folder. A damaged block is removed, with a line that says so: its rows are computed again."""
    blocks = [_read_block(folder / name) for name in block_names(folder)]
    return make_rows(np.concatenate([np.empty(0, ROW), *(block for block in blocks if block is not None)]))


def is_whole(path: Path) -> bool:
    """Whether a file named after the hash of its bytes is there and has these bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32] == path.stem.partition("-")[2]
    except FileNotFoundError:
        return False


def _read_block(path: Path) -> np.ndarray | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # another job found it damaged, and was quicker
        return None
    if hashlib.sha256(content).hexdigest()[:32] != path.stem.partition("-")[2]:
        say(f"reference cache: {path} is damaged and is removed; its rows are computed again")
        path.unlink(missing_ok=True)
        return None
    return np.frombuffer(content, ROW)


def write_making(block: Path, making: Making) -> None:
    """Records beside a block how it was made. A block without this record stays valid: how it was made is unknown."""
    write_atomically(_making_path(block), json.dumps(dict(making)).encode())


def makings_of(folder: Path, keys: np.ndarray) -> list[Making | None]:
    """How the rows of these keys, (M, 2), were made: each way once, None where it is not known."""
    paths = [folder / name for name in block_names(folder)]
    ways: dict[str, list[Path]] = {}
    for path in paths:
        ways.setdefault(json.dumps(_read_making(path), sort_keys=True), []).append(path)
    used = ways if len(ways) == 1 else {way: some for way, some in ways.items() if _hold(some, keys)}
    return [json.loads(way) for way in sorted(used)]


def _hold(blocks: Sequence[Path], keys: np.ndarray) -> bool:
    """Whether any of the keys is in any of the blocks."""
    return any((_rows_of(block).find(keys) >= 0).any() for block in blocks)


def _rows_of(block: Path) -> RefRows:
    table = _read_block(block)
    return make_rows(np.empty(0, ROW) if table is None else table)


def _making_path(block: Path) -> Path:
    return block.with_name(f"made-{block.stem.partition('-')[2]}.json")


def _read_making(block: Path) -> Making | None:
    """None where there is no record, or one that cannot be read."""
    try:
        return dict(json.loads(_making_path(block).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_rows(folder: Path, keys: np.ndarray, logps: np.ndarray) -> Path:
    """Adds a block of rows, keys (N, 2) and logps (N,), in one atomic step."""
    table = np.empty(len(keys), ROW)
    table["high"], table["low"], table["logp"] = keys[:, 0], keys[:, 1], logps
    content = table.tobytes()
    target = folder / f"rows-{hashlib.sha256(content).hexdigest()[:32]}.bin"
    write_atomically(target, content)
    return target
