"""The reference's log-probabilities of a run's data, sorted by key in one file, of which a step reads a few pages.

    CACHE/<reference key>/index-<hash of the data>.json   names the file of rows and the blocks that they were copied
                                                          from, says how these were computed, and has its own hash
                          table-<sha256>.npy              the rows; its name is the hash of its bytes

A table is valid as long as its blocks (`blocks.py`) exist and are undamaged; otherwise it is written again. Version
0.2.0 wrote table-<hash of the data>.json, without a hash: it is left to its jobs, which may share the cache.

Memory holds the high half of the first key of each page, 8 bytes per 256 rows: 61 KiB for two million completions. A
table of five rows, with pages of 2 rows instead of ROWS_PER_PAGE:

    page      0               1               2
    rows      (5, 1) (8, 1)   (8, 2) (9, 1)   (12, 1)     keys (high, low), on disk, 24 bytes per row
    firsts    5               8               12          in memory

`logp` reads from the last page whose first is below the key's high half to the last page whose first is not above it:

    (9, 1)    page 1 alone
    (8, 2)    pages 0 and 1: rows with high half 8 may begin inside page 0, and do here
    (5, 1)    page 0, since no first is below 5
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.base.arrays import DiskArray, open_array
from dpo.base.errors import RunError
from dpo.base.files import write_atomically
from dpo.ref_logps.blocks import ROW, Circumstances, block_names, circumstances_of, is_whole, read_rows, split_keys
from dpo.terminal.console import say

ROWS_PER_PAGE = 256
"""Rows that are read together: 6 KiB."""

_TABLE, _BLOCK = re.compile(r"table-[0-9a-f]{32}\.npy"), re.compile(r"rows-[0-9a-f]{32}\.bin")
"""The names that the files of rows and the blocks have: no others are read or removed."""


@dataclass(frozen=True, eq=False)
class RefTable:
    """Reads reference log-probabilities by key from a file of M rows."""

    rows: DiskArray
    """(M,) of dtype ROW, on disk, sorted by key, each key once."""
    firsts: np.ndarray
    """The high half of the first key of each page, (M / ROWS_PER_PAGE, rounded up,), uint64."""

    def __len__(self) -> int:
        return len(self.rows)

    def logp(self, key: bytes) -> float:
        """Returns the log-probability of a key of 16 bytes, in nats. Raises KeyError where no row has it."""
        high, low = split_keys([key])[0]
        begin = max(int(np.searchsorted(self.firsts, high, side="left")) - 1, 0)  # keys may share their high half
        end = int(np.searchsorted(self.firsts, high, side="right"))
        rows = self.rows[begin * ROWS_PER_PAGE : end * ROWS_PER_PAGE]
        matches = np.flatnonzero((rows["high"] == high) & (rows["low"] == low))
        if not len(matches):
            raise KeyError(key.hex())
        return float(rows["logp"][matches[0]])


def table_name(contents: Sequence[str]) -> str:
    """Returns the name of the JSON file of the table for data sets with these hashes by content, in this order."""
    return f"index-{hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:32]}.json"


def find_table(folder: Path, name: str) -> Path | None:
    """Returns the file of rows of a valid table; None where there is none. Removes a damaged file, with a message. Of
    damaged blocks `read_rows` tells.
    """
    about = _read_about(folder / name)
    if about is None:
        return None
    for block in about["blocks"]:
        if not (folder / block).exists():
            say(f"reference cache: {folder / block} is missing; its rows are computed again")
    if not all(is_whole(folder / block) for block in about["blocks"]):
        return None
    path: Path = folder / about["rows"]
    if is_whole(path):
        return path
    say(f"reference cache: {path} is damaged and is made again")
    path.unlink(missing_ok=True)
    return None


def table_circumstances(folder: Path, name: str) -> list[Circumstances | None]:
    """Returns the different ways in which the rows of a table were computed; None stands for an unknown way."""
    made: list[Circumstances | None] = (_read_about(folder / name) or {}).get("made", [None])
    return made


def _read_about(path: Path) -> dict[str, Any] | None:
    """Returns the facts of a table's JSON file; None where there is no file. Removes a damaged one, with a message."""
    try:
        content = json.loads(path.read_bytes())
        about: dict[str, Any] = content["about"]
        if content["sha256"] == _sha256(path.name, about) and _is_own(about):
            return about
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    say(f"reference cache: {path} is damaged and is made again")
    path.unlink(missing_ok=True)
    return None


def _is_own(about: Mapping[str, Any]) -> bool:
    """Returns whether the facts of a table name files of the cache's own forms alone: a damaged one is removed."""
    return bool(_TABLE.fullmatch(about["rows"])) and all(map(_BLOCK.fullmatch, about["blocks"]))


def _sha256(name: str, about: Mapping[str, Any]) -> str:
    """Returns the hash of the name of a table's JSON file and of its facts: those of other data are not taken."""
    return hashlib.sha256(json.dumps([name, about], sort_keys=True).encode()).hexdigest()


def write_table(folder: Path, name: str, keys: np.ndarray) -> Path:
    """Writes the table of some keys, with the rows of the blocks of the folder.

    Args:
        folder: the folder of the cache, with its blocks.
        name: the file name of the table's JSON file, from `table_name`.
        keys: (M, 2) uint64, high and low half of each key, sorted, each key once.

    Returns:
        The path of the table's file of rows.

    Raises:
        RunError: a key is in no block.
        OSError: the table cannot be written.
    """
    cached = read_rows(folder)
    places = cached.find(keys)
    if (places < 0).any():
        raise RunError(f"reference.cache_dir: {int((places < 0).sum())} rows are gone from {folder}; start again")
    rows = np.empty(len(keys), ROW)
    rows["high"], rows["low"], rows["logp"] = keys[:, 0], keys[:, 1], cached.logps[places]
    file = io.BytesIO()
    np.save(file, rows)
    path = folder / f"table-{hashlib.sha256(file.getbuffer()).hexdigest()[:32]}.npy"
    write_atomically(path, file.getbuffer())
    about = {"rows": path.name, "blocks": block_names(folder), "made": circumstances_of(folder, keys)}
    content = json.dumps({"sha256": _sha256(name, about), "about": about}, indent=1)
    write_atomically(folder / name, content.encode())  # last: the files that it names exist
    return path


def open_table(path: Path) -> RefTable:
    """Opens the table whose file rank 0 found or wrote. Raises RunError where this process does not see it whole."""
    if not is_whole(path):
        raise RunError(f"reference.cache_dir: not every rank sees {path}; start again, or share the folder")
    rows = open_array(path)
    pages = np.arange(0, len(rows), ROWS_PER_PAGE)
    firsts = [rows[place : place + 1]["high"] for place in pages.tolist()]
    return RefTable(rows, np.concatenate(firsts) if firsts else np.empty(0, np.uint64))
