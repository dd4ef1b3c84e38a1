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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo.base.arrays import DiskArray, HeldFile, hold_file, open_array, read_into
from dpo.base.arrow_files import open_rows
from dpo.pairs.pair_values import NEUTRAL

Column = DiskArray | np.ndarray
"""A column on disk, or in memory after a selection."""
NAMES = ("row_of_pair", "pair_in_row", "prompt_of_pair", "sizes", "places", "keys")
"""The columns of every set, each a file."""
VALUES: Mapping[str, str] = {"weights": "weight", "margins": "margin"}
"""Further columns, which a set has where one of its sources names them: the name of the column of its token rows."""


@dataclass(frozen=True)
class Pair:
    """One preference as token ids, 1-D int32 arrays; a completion includes its EOS unless it was truncated."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    weight: float = 1.0
    """The factor of the pair's loss."""
    margin: float = 0.0
    """The margin m of the loss `dpo`: -log sigmoid(beta h - m)."""
    id: int | None = None
    """Its index in the `PairSet` from which it was read; None for a pair of no set."""


@dataclass(frozen=True, eq=False)
class PairSet:
    """The N pairs of an epoch of a data set, in file order; a pair that an epoch has several times stands so many times
    one after another.
    """

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
    weights: Column | None = None
    """(N,) float64: the weight of each pair; None where no source names a weight: all are 1."""
    margins: Column | None = None
    """(N,) float64: the margin of each pair; None where no source names a margin: all are 0."""

    def __len__(self) -> int:
        """Returns the number of pairs, N."""
        return len(self.row_of_pair)

    @property
    def has_losers(self) -> bool:
        """Returns whether its pairs compare two completions; else each has its winner in the loser's place, as for the
        loss `sft`. A pair of equal completions is dropped otherwise.
        """
        return not len(self) or bool(self.keys[:1][0, 0] != self.keys[:1][0, 1])

    @functools.cached_property
    def content_hash(self) -> str:
        """Returns a hash of the keys of all pairs in order, and of their weights and margins where any is not neutral,
        32 hex digits; a key stands for the ids of prompt and completion.
        """
        content = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), 2**16):
            content.update(self.keys[start : start + 2**16].tobytes())
        for name, column in self._values().items():
            numbers = np.asarray(column, "<f8")
            if (numbers != NEUTRAL[VALUES[name]]).any():
                content.update(name.encode() + numbers.tobytes())
        return content.hexdigest()

    @property
    def rows(self) -> pa.Table:
        """Returns the token rows (`token_rows.COLUMNS`) of `token_files`, mapped into memory."""
        return open_rows([file.name for file in self.token_files])

    def row(self, number: int) -> dict[str, Any]:
        """Returns a row of `rows`."""
        fields: dict[str, Any] = self.rows.slice(number, 1).to_pylist()[0]
        return fields

    def pairs(self, ids: np.ndarray) -> list[Pair]:
        """Returns the pairs with these ids (0 to N - 1), in the order of `ids`; reads their token ids from disk."""
        ids = np.asarray(ids, np.int64)
        begins = np.cumsum([0, *(file.size for file in self.token_files)])
        read = functools.partial(_read_ids, self.token_files, begins)
        places, sizes = self.places[ids].tolist(), self.sizes[ids].tolist()
        values = _values_at(self.weights, ids, NEUTRAL["weight"]), _values_at(self.margins, ids, NEUTRAL["margin"])
        found = []
        for number, at, num, weight, margin in zip(ids.tolist(), places, sizes, *values, strict=True):
            prompt_ids, chosen_ids, rejected_ids = map(read, at, num)
            found.append(Pair(prompt_ids, chosen_ids, rejected_ids, weight, margin, number))
        return found

    def lengths(self) -> np.ndarray:
        """Returns the tokens of prompt, winner and loser of each pair, (N, 3) int32."""
        return np.asarray(self.sizes)

    def source_of_pair(self, rows: Sequence[int]) -> np.ndarray:
        """Returns the number of the source of each pair, (N,) int32, given the rows of each source in order."""
        return np.searchsorted(np.cumsum(rows), np.asarray(self.row_of_pair), side="right").astype(np.int32)

    def select(self, mask: np.ndarray) -> "PairSet":
        """Returns the set of the pairs for which `mask` (N,) is true."""
        return replace(self, **{name: getattr(self, name)[mask] for name in (*NAMES, *self._values())})

    def is_first(self) -> np.ndarray:
        """Returns whether each pair is the first of those with its row and its index there, (N,) bool: true for all
        pairs where an epoch has no pair twice.
        """
        places = np.column_stack([self.row_of_pair, self.pair_in_row])
        return np.append(True, (places[1:] != places[:-1]).any(1))[: len(self)]

    def _values(self) -> dict[str, Column]:
        """Returns the columns of VALUES that the set has."""
        found = {name: getattr(self, name) for name in VALUES}
        return {name: column for name, column in found.items() if column is not None}


def _values_at(column: Column | None, ids: np.ndarray, neutral: float) -> list[float]:
    """Returns the values of a column at `ids`; the neutral one where there is no column."""
    values: list[float] = [neutral] * len(ids) if column is None else column[ids].tolist()
    return values


def _read_ids(files: Sequence[HeldFile], begins: np.ndarray, place: int, size: int) -> np.ndarray:
    """Returns the (size,) int32 ids at byte `place`, counted through `files`, which begin at the bytes `begins`."""
    number = int(np.searchsorted(begins, place, side="right")) - 1
    ids = np.empty(size, np.int32)
    read_into(files[number], ids, place - int(begins[number]))
    return ids


def open_pair_set(folder: Path, token_files: Sequence[str], values: Sequence[str]) -> PairSet:
    """Returns the set that `numbering.write_pair_set` wrote with these `values`. Its files stay open, so that they may
    be removed from the cache meanwhile.
    """
    columns = {name: open_array(folder / f"{name}.npy") for name in (*NAMES, *values)}
    return PairSet(tuple(hold_file(name) for name in token_files), **columns)
