"""The files of the reference cache: immutable blocks of rows (key of prompt and completion -> log-probability).

    CACHE/<reference key>/about.json            the facts behind the reference key
                          rows-<sha256>.bin     a block; its name is the hash of its bytes
                          made-<sha256>.json    how the block of that name was computed (`Circumstances`)
                          index-…, table-…      the rows of one data set, collected from the blocks (`table.py`)

A block is written under another name and renamed, and never changes. So several jobs may read and add blocks at the
same time, and a killed job leaves complete blocks only. The folder's name (`reference_key`) alone says that rows belong
together.

Two jobs fill one cache, and a third job reads it:

    job A    adds rows-33b6….bin    2 rows, 48 bytes
    job B    adds rows-89e3….bin    3 rows, 72 bytes
    job C    `read_rows`            5 rows; a row in both blocks would count once

The row of the prompt with tokens 1 2 and its completion with token 3, whose log-probability is -1.0 nats:

    key    133a54945278d62b 76ce438ad05fc6bb                             16 bytes (`completion_key`)
    row    high 0x2bd6785294543a13, low 0xbbc65fd08a43ce76, logp -1.0    24 bytes: little-endian halves, float64
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo.base.files import write_atomically
from dpo.terminal.console import say

ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("logp", "<f8")])
"""A row on disk, 24 bytes: the two halves of a 16-byte key as little-endian integers, and the log-probability in nats
(float64 holds a float32 exactly)."""

Circumstances = Mapping[str, str | bool]
"""How a block of rows was computed, beyond the facts of their key: `torch`, its version; `device`, the compute
capability or "cpu"; `compile`, whether layers were compiled."""


def reference_key(facts: Mapping[str, str]) -> str:
    """Returns the folder name for the facts that decide the value of a row: the model's hash by content, and the
    numerics.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def split_keys(keys: Sequence[bytes]) -> np.ndarray:
    """Returns N keys of 16 bytes as an array (N, 2) of uint64: the high half (the first 8 bytes) and the low half."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)


@dataclass(frozen=True, eq=False)
class RefRows:
    """Holds reference log-probabilities by key, in memory: high (N,) sorted, low (N,), logps (N,) in nats."""

    high: np.ndarray
    low: np.ndarray
    logps: np.ndarray

    def __len__(self) -> int:
        return len(self.high)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the row number of each of keys (M, 2), or -1 where it is in no row: (M,)."""
        place = np.searchsorted(self.high, keys[:, 0])
        numbers = np.full(len(keys), -1)
        open_ = np.ones(len(keys), bool)
        while open_.any():  # once, and again only for keys whose high half belongs to several rows
            inside = open_ & (place < len(self))
            open_ = np.zeros(len(keys), bool)
            open_[inside] = self.high[place[inside]] == keys[inside, 0]
            hit = open_.copy()
            hit[open_] = self.low[place[open_]] == keys[open_, 1]
            numbers[hit] = place[hit]
            open_ &= ~hit
            place = place + open_
        return numbers


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """Returns the index of the first occurrence of each different key of keys (N, 2), in sorted order of the keys."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    first: np.ndarray = order[np.append(True, (np.diff(keys[order], axis=0) != 0).any(1))[: len(keys)]]
    return first


def make_rows(table: np.ndarray) -> RefRows:
    """Returns the rows of an array of dtype ROW, sorted, each key once."""
    table = table[first_of_each(np.stack([table["high"], table["low"]], 1))]
    return RefRows(table["high"].copy(), table["low"].copy(), table["logp"].copy())


def block_names(folder: Path) -> list[str]:
    """Returns the file names of the blocks in a cache folder, sorted."""
    return sorted(path.name for path in folder.glob("rows-*.bin"))


def read_rows(folder: Path) -> RefRows:
    """Reads all rows of a cache folder. Removes damaged blocks, with a message; their rows must be computed again."""
    blocks = [_read_block(folder / name) for name in block_names(folder)]
    return make_rows(np.concatenate([np.empty(0, ROW), *(block for block in blocks if block is not None)]))


def is_whole(path: Path) -> bool:
    """Returns whether a file that is named after the hash of its bytes exists and has that hash."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32] == path.stem.partition("-")[2]
    except FileNotFoundError:
        return False


def _read_block(path: Path) -> np.ndarray | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # another job found it damaged and removed it
        return None
    if hashlib.sha256(content).hexdigest()[:32] != path.stem.partition("-")[2]:
        say(f"reference cache: {path} is damaged and is removed; its rows are computed again")
        path.unlink(missing_ok=True)
        return None
    return np.frombuffer(content, ROW)


def write_circumstances(block: Path, circumstances: Circumstances) -> None:
    """Writes the record of how a block was computed beside it. A block without a record is valid, and its
    circumstances are unknown.
    """
    write_atomically(_circumstances_path(block), json.dumps(dict(circumstances)).encode())


def circumstances_of(folder: Path, keys: np.ndarray) -> list[Circumstances | None]:
    """Returns the different ways in which the rows of keys (M, 2) were computed; None stands for an unknown way."""
    paths = [folder / name for name in block_names(folder)]
    ways: dict[str, list[Path]] = {}
    for path in paths:
        ways.setdefault(json.dumps(_read_circumstances(path), sort_keys=True), []).append(path)
    used = ways if len(ways) == 1 else {way: blocks for way, blocks in ways.items() if _hold(blocks, keys)}
    return [json.loads(way) for way in sorted(used)]


def _hold(blocks: Sequence[Path], keys: np.ndarray) -> bool:
    """Returns whether any of the keys is in any of the blocks."""
    return any((_rows_of(block).find(keys) >= 0).any() for block in blocks)


def _rows_of(block: Path) -> RefRows:
    table = _read_block(block)
    return make_rows(np.empty(0, ROW) if table is None else table)


def _circumstances_path(block: Path) -> Path:
    return block.with_name(f"made-{block.stem.partition('-')[2]}.json")


def _read_circumstances(block: Path) -> Circumstances | None:
    """Returns the record of a block; None where there is no readable record."""
    try:
        return dict(json.loads(_circumstances_path(block).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_rows(folder: Path, keys: np.ndarray, logps: np.ndarray) -> Path:
    """Adds a block of N rows to a cache folder in one atomic step.

    Args:
        folder: the folder of the cache, which exists.
        keys: (N, 2) uint64, high and low half of each completion's key.
        logps: (N,) log-probabilities under the reference, nats; stored as float64.

    Returns:
        The path of the block, which is named after the hash of its bytes.

    Raises:
        OSError: the block cannot be written.
    """
    table = np.empty(len(keys), ROW)
    table["high"], table["low"], table["logp"] = keys[:, 0], keys[:, 1], logps
    content = table.tobytes()
    target = folder / f"rows-{hashlib.sha256(content).hexdigest()[:32]}.bin"
    write_atomically(target, content)
    return target
