"""The kept pairs of a data set as files: where in the token rows each pair's ids lie, and what it is known by.

The files are made once and cached. A run reads of them, and of the files of token rows, the pairs of a step and nothing
else: a million pairs take no more memory than a thousand.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from dpo.base.arrays import DiskArray, HeldFile, hold_file, open_array, read_into
from dpo.data.token_rows import keys16, lists, offsets, pairs_of

Column = DiskArray | np.ndarray
NAMES = ("row_of_pair", "pair_in_row", "prompt_of_pair", "sizes", "places", "keys")


@dataclass(frozen=True)
class Pair:
    """One preference as token ids, each a 1-D int32 array; the completions end as the model should end them."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray


@dataclass(frozen=True, eq=False)
class PairSet:
    """The kept pairs of a data set, in file order; N of them.

    A pair is item `pair_in_row` of the column `pairs` of row `row_of_pair`; both are (N,) int32, the rows rising.
    `prompt_of_pair` (N,) int32: pairs with equal prompt ids have equal numbers, from 0 by first appearance.
    `sizes` (N, 3) int32: tokens of prompt, winner and loser. `places` (N, 3) int64: where the ids of each begin, in
    bytes, in the token files one after the other. `keys` (N, 2) of 16 bytes: the `completion_key` of winner and loser.
    """

    token_files: tuple[HeldFile, ...]
    row_of_pair: Column
    pair_in_row: Column
    prompt_of_pair: Column
    sizes: Column
    places: Column
    keys: Column

    def __len__(self) -> int:
        return len(self.row_of_pair)

    @functools.cached_property
    def content_hash(self) -> str:
        """Of the keys of every pair's winner and loser in order, hex; a key stands for the ids of prompt and
        completion.
        """
        content = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), 2**16):
            content.update(self.keys[start : start + 2**16].tobytes())
        return content.hexdigest()

    @property
    def rows(self) -> datasets.Dataset:
        """The token rows (`token_rows.FEATURES`) in which the pairs stand, mapped into memory."""
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file.name) for file in self.token_files])

    def pairs(self, ids: np.ndarray) -> list[Pair]:
        """The pairs of these ids, in their order; their token ids are read from disk."""
        ids = np.asarray(ids, np.int64)
        begins = np.cumsum([0, *(file.size for file in self.token_files)])
        read = functools.partial(_read_ids, self.token_files, begins)
        places, sizes = self.places[ids].tolist(), self.sizes[ids].tolist()
        return [Pair(*map(read, at, num)) for at, num in zip(places, sizes, strict=True)]

    def lengths(self) -> np.ndarray:
        """Tokens of prompt, winner and loser of each pair, (N, 3) int32."""
        return np.asarray(self.sizes)

    def some(self, mask: np.ndarray) -> "PairSet":
        """The pairs for which `mask` (N,) is true."""
        return replace(self, **{name: getattr(self, name)[mask] for name in NAMES})


def _read_ids(files: Sequence[HeldFile], begins: np.ndarray, place: int, size: int) -> np.ndarray:
    """(size,) int32 at a place in files that begin at `begins`, bytes."""
    number = int(np.searchsorted(begins, place, side="right")) - 1
    ids = np.empty(size, np.int32)
    read_into(files[number], ids, place - int(begins[number]))
    return ids


def open_pair_set(folder: Path, token_files: Sequence[str]) -> PairSet:
    """The set that `write_pair_set` left. The files are held open: it may be removed from the cache meanwhile."""
    columns = {name: open_array(folder / f"{name}.npy") for name in NAMES}
    return PairSet(tuple(hold_file(name) for name in token_files), **columns)


# --- made ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Written:
    """What a set holds: pairs, and the keys of its different prompts, sorted, S16."""

    num_pairs: int
    prompts: np.ndarray


def write_pair_set(folder: Path, token_files: Sequence[str], is_kept: np.ndarray) -> Written:
    """Writes the set of the pairs in those rows of token files for which `is_kept` (rows,) is true."""
    parts = [_empty_part(), *(part for part in _parts(token_files, is_kept) if len(part["row_of_pair"]))]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    prompts, first, prompt = np.unique(columns.pop("prompt_key"), return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first))
    folder.mkdir()
    for name, column in (columns | {"prompt_of_pair": rank[prompt]}).items():
        np.save(folder / f"{name}.npy", column)
    return Written(len(prompt), prompts)


def _empty_part() -> dict[str, np.ndarray]:
    return {
        "row_of_pair": np.empty(0, np.int32),
        "pair_in_row": np.empty(0, np.int32),
        "sizes": np.empty((0, 3), np.int32),
        "places": np.empty((0, 3), np.int64),
        "keys": np.empty((0, 2), "S16"),
        "prompt_key": np.empty(0, "S16"),
    }


def _parts(token_files: Sequence[str], is_kept: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The columns of the kept pairs of every record batch."""
    first_row, first_byte = 0, 0
    for name in token_files:
        with pa.memory_map(name) as file:
            memory = file.read_buffer()
            file.seek(0)
            for batch in pa.ipc.open_stream(file):
                yield _part(batch, is_kept[first_row : first_row + len(batch)], first_row, first_byte, memory)
                first_row += len(batch)
            first_byte += memory.size
    assert first_row == len(is_kept)


def _part(
    batch: pa.RecordBatch, is_kept: np.ndarray, first_row: int, first_byte: int, memory: pa.Buffer
) -> dict[str, np.ndarray]:
    begins, pairs = pairs_of(batch)
    counts = np.where(is_kept, np.diff(begins), 0)
    row = np.repeat(np.arange(len(batch), dtype=np.int32), counts)
    pair_in_row = np.arange(len(row), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
    first_of_row, completions = lists(batch, "completion_ids")
    listed = pairs[begins[row] + pair_in_row] + first_of_row[row][:, None]  # (n, 2) among the batch's completions
    prompt_place, prompt_size = _places_of(batch.column("prompt_ids"), memory)
    place, size = _places_of(completions, memory)
    return {
        "row_of_pair": row + np.int32(first_row),
        "pair_in_row": pair_in_row,
        "sizes": np.column_stack([prompt_size[row], size[listed]]).astype(np.int32),
        "places": first_byte + np.column_stack([prompt_place[row], place[listed]]),
        "keys": keys16(lists(batch, "completion_keys")[1])[listed],
        "prompt_key": keys16(batch.column("prompt_key"))[row],
    }


def _places_of(array: pa.ListArray, memory: pa.Buffer) -> tuple[np.ndarray, np.ndarray]:
    """Where the int32 items of each list begin in the mapped file, in bytes, and how many they are, both (lists,)."""
    at, items = offsets(array), array.flatten()
    if not len(items):
        return np.zeros(len(array), np.int64), np.zeros(len(array), np.int64)
    first = items.buffers()[1].address + 4 * items.offset - memory.address
    assert 0 <= first and first + 4 * len(items) <= memory.size, "items that were copied lie nowhere in the file"
    return first + 4 * at[:-1], np.diff(at)
