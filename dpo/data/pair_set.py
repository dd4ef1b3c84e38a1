"""The kept pairs of a data set as files: where in the files of token rows the ids of each pair lie, and their keys.

The files are made once and cached. A step reads its own pairs from them and from the files of token rows, and nothing
else, so that a million pairs take no more memory than a thousand.

An example: one file of two token rows

    row 0    prompt_ids [1, 2]    completion_ids [3, 4, 5], [6]    pairs [[0, 1]]
    row 1    prompt_ids [1, 2]    completion_ids [7], [8, 9]       pairs [[1, 0], [0, 1]]

The file stores the items of a column one after another, 4 bytes each: from byte P the prompts, 1 2 1 2, and from byte C
the completions, 3 4 5 6 7 8 9. The three pairs become

    pair    row_of_pair    pair_in_row    prompt_of_pair    sizes      places (bytes)
    0       0              0              0                 2, 3, 1    P,     C,      C + 12
    1       1              0              0                 2, 2, 1    P + 8, C + 20, C + 16
    2       1              1              0                 2, 1, 2    P + 8, C + 16, C + 20

Places of a second file would count on from the size of the first.
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
"""A column on disk, or in memory after a selection."""
NAMES = ("row_of_pair", "pair_in_row", "prompt_of_pair", "sizes", "places", "keys")
"""The columns of a set, each a file."""


@dataclass(frozen=True)
class Pair:
    """One preference as token ids, 1-D int32 arrays; a completion includes its EOS unless it was truncated."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray


@dataclass(frozen=True, eq=False)
class PairSet:
    """The N kept pairs of a data set, in file order."""

    token_files: tuple[HeldFile, ...]
    """The files of token rows; rows and bytes are counted through all of them."""
    row_of_pair: Column
    """(N,) int32, rising: the token row of each pair."""
    pair_in_row: Column
    """(N,) int32: the pair's index in the column `pairs` of its row."""
    prompt_of_pair: Column
    """(N,) int32: pairs with equal prompt ids have equal numbers, from 0 by first appearance."""
    sizes: Column
    """(N, 3) int32: tokens of prompt, winner and loser."""
    places: Column
    """(N, 3) int64: the byte at which the ids of prompt, winner and loser begin."""
    keys: Column
    """(N, 2) S16: the `completion_key` of winner and loser."""

    def __len__(self) -> int:
        """Returns the number of pairs, N."""
        return len(self.row_of_pair)

    @functools.cached_property
    def content_hash(self) -> str:
        """Returns a hash of the keys of all pairs in order, 32 hex digits; a key stands for the ids of prompt and
        completion.
        """
        content = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), 2**16):
            content.update(self.keys[start : start + 2**16].tobytes())
        return content.hexdigest()

    @property
    def rows(self) -> datasets.Dataset:
        """Returns the token rows (`token_rows.FEATURES`) of `token_files`, mapped into memory."""
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file.name) for file in self.token_files])

    def pairs(self, ids: np.ndarray) -> list[Pair]:
        """Returns the pairs with these ids (0 to N - 1), in the order of `ids`; reads their token ids from disk."""
        ids = np.asarray(ids, np.int64)
        begins = np.cumsum([0, *(file.size for file in self.token_files)])
        read = functools.partial(_read_ids, self.token_files, begins)
        places, sizes = self.places[ids].tolist(), self.sizes[ids].tolist()
        return [Pair(*map(read, at, num)) for at, num in zip(places, sizes, strict=True)]

    def lengths(self) -> np.ndarray:
        """Returns the tokens of prompt, winner and loser of each pair, (N, 3) int32."""
        return np.asarray(self.sizes)

    def select(self, mask: np.ndarray) -> "PairSet":
        """Returns the set of the pairs for which `mask` (N,) is true."""
        return replace(self, **{name: getattr(self, name)[mask] for name in NAMES})


def _read_ids(files: Sequence[HeldFile], begins: np.ndarray, place: int, size: int) -> np.ndarray:
    """Returns the (size,) int32 ids at byte `place`, counted through `files`, which begin at the bytes `begins`."""
    number = int(np.searchsorted(begins, place, side="right")) - 1
    ids = np.empty(size, np.int32)
    read_into(files[number], ids, place - int(begins[number]))
    return ids


def open_pair_set(folder: Path, token_files: Sequence[str]) -> PairSet:
    """Returns the set that `write_pair_set` wrote. Its files stay open, so that they may be removed from the cache
    meanwhile.
    """
    columns = {name: open_array(folder / f"{name}.npy") for name in NAMES}
    return PairSet(tuple(hold_file(name) for name in token_files), **columns)


# --- made ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Written:
    """The contents of a set that was written."""

    num_pairs: int
    prompts: np.ndarray
    """The keys of its distinct prompts, sorted, S16."""


def write_pair_set(folder: Path, token_files: Sequence[str], is_kept: np.ndarray) -> Written:
    """Writes the set of the pairs of all token rows that are kept, as a new folder.

    Args:
        folder: the folder to make; it must not exist.
        token_files: the Arrow files of the token rows, in the order of the rows.
        is_kept: (rows,) bool, over the rows of all files: whether the pairs of a row belong to the set.

    Returns:
        The number of pairs and the keys of their prompts.
    """
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
    """Returns the columns of no pairs, which give an empty set its dtypes and shapes."""
    return {
        "row_of_pair": np.empty(0, np.int32),
        "pair_in_row": np.empty(0, np.int32),
        "sizes": np.empty((0, 3), np.int32),
        "places": np.empty((0, 3), np.int64),
        "keys": np.empty((0, 2), "S16"),
        "prompt_key": np.empty(0, "S16"),
    }


def _parts(token_files: Sequence[str], is_kept: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of the kept pairs of each record batch."""
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
    """Returns the columns of the kept pairs of a record batch.

    Args:
        batch: token rows, not copied from `memory`.
        is_kept: (rows of the batch,) bool.
        first_row: the batch's first row, counted through all files.
        first_byte: the first byte of the batch's file, counted through all files.
        memory: the whole file, mapped.
    """
    begins, pairs = pairs_of(batch)
    counts = np.where(is_kept, np.diff(begins), 0)
    row = np.repeat(np.arange(len(batch), dtype=np.int32), counts)
    pair_in_row = np.arange(len(row), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
    first_of_row, completions = lists(batch, "completion_ids")
    listed = pairs[begins[row] + pair_in_row] + first_of_row[row][:, None]  # (n, 2) indices of the batch's completions
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
    """Returns the byte of the mapped file at which each list of int32 begins, and its number of items, both (lists,).

    The place follows from the address of the items in memory, which is within the mapped file unless they were copied.
    """
    item_offsets, items = offsets(array), array.flatten()
    if not len(items):
        return np.zeros(len(array), np.int64), np.zeros(len(array), np.int64)
    first = items.buffers()[1].address + 4 * items.offset - memory.address
    assert 0 <= first and first + 4 * len(items) <= memory.size, "the items were copied out of the mapped file"
    return first + 4 * item_offsets[:-1], np.diff(item_offsets)
