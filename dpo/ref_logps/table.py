"""The reference's log-probabilities of a run's data, sorted by key in one file of the cache, of which a step reads what
it needs.

    CACHE/<reference key>/table-<content of the data>.json   the file of rows, the blocks that they came from, and how
                                                             these were made
                          table-<sha256>.npy                  the rows; its name is the hash of its bytes

A table is derived from blocks (`cache.py`) and holds as long as these are there and whole: where one of them is gone or
damaged it is made anew.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.base.arrays import DiskArray, open_array
from dpo.base.console import say
from dpo.base.errors import RunError
from dpo.base.files import write_atomically
from dpo.ref_logps.blocks import ROW, Making, block_names, is_whole, makings_of, read_rows, split_keys

ROWS_A_PAGE = 256


@dataclass(frozen=True, eq=False)
class RefTable:
    """Reference log-probabilities by key: rows (M,) of dtype ROW, sorted, and the first half of every ROWS_A_PAGE-th
    key, which is all of them that is in memory.
    """

    rows: DiskArray
    firsts: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def logp(self, key: bytes) -> float:
        """The log-probability of one key, nats. Raises KeyError."""
        high, low = split_keys([key])[0]
        first = max(int(np.searchsorted(self.firsts, high, side="left")) - 1, 0)  # keys may share their first half
        last = int(np.searchsorted(self.firsts, high, side="right"))
        page = self.rows[first * ROWS_A_PAGE : last * ROWS_A_PAGE]
        found = np.flatnonzero((page["high"] == high) & (page["low"] == low))
        if not len(found):
            raise KeyError(key.hex())
        return float(page["logp"][found[0]])


def table_name(contents: Sequence[str]) -> str:
    """The name of the table of data sets with these contents."""
    return f"table-{hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:32]}.json"


def find_table(folder: Path, name: str) -> Path | None:
    """The file of rows of a table that holds. A damaged one is removed, with a line that says so."""
    about = _read_about(folder / name)
    if about is None or not all(is_whole(folder / block) for block in about["blocks"]):
        return None
    path: Path = folder / about["rows"]
    if is_whole(path):
        return path
    _remove_damaged(path)
    return None


def table_makings(folder: Path, name: str) -> list[Making | None]:
    """How the rows of a table that is there were made, each way once; None where it is not known."""
    makings: list[Making | None] = (_read_about(folder / name) or {}).get("made", [None])
    return makings


def _read_about(path: Path) -> dict[str, Any] | None:
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
        return about
    except FileNotFoundError:
        return None
    except ValueError:
        _remove_damaged(path)
        return None


def _remove_damaged(path: Path) -> None:
    if path.exists():
        say(f"reference cache: {path} is damaged and is made again")
        path.unlink(missing_ok=True)


def write_table(folder: Path, name: str, keys: np.ndarray) -> Path:
    """Writes the table of these keys, (M, 2) uint64, sorted, each once, from the blocks that have them. Raises RunError
    where a key is in no block.
    """
    found = read_rows(folder)
    places = found.find(keys)
    if (places < 0).any():
        raise RunError(f"reference.cache_dir: {int((places < 0).sum())} rows are gone from {folder}; start again")
    rows = np.empty(len(keys), ROW)
    rows["high"], rows["low"], rows["logp"] = keys[:, 0], keys[:, 1], found.logps[places]
    file = io.BytesIO()
    np.save(file, rows)
    path = folder / f"table-{hashlib.sha256(file.getbuffer()).hexdigest()[:32]}.npy"
    write_atomically(path, file.getbuffer())
    about = {"rows": path.name, "blocks": block_names(folder), "made": makings_of(folder, keys)}
    write_atomically(folder / name, json.dumps(about, indent=1).encode())  # last: what it names is there
    return path


def open_table(path: Path) -> RefTable:
    """The table in a file that rank 0 found or wrote. Raises RunError where this process does not see it whole."""
    if not is_whole(path):
        raise RunError(f"reference.cache_dir: {path} is not seen by every rank; start again, or share the folder")
    rows = open_array(path)
    pages = np.arange(0, len(rows), ROWS_A_PAGE)
    firsts = [rows[place : place + 1]["high"] for place in pages.tolist()]
    return RefTable(rows, np.concatenate(firsts) if firsts else np.empty(0, np.uint64))
