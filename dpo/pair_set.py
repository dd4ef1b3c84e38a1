"""The kept pairs of a data set as indices into memory-mapped token rows: memory holds three integers a pair."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa

from dpo.plan import Pair
from dpo.token_rows import BLOCK, blocks, column_keys, keys16, lists, offsets, pairs_of

Completions = tuple[np.ndarray, list[np.ndarray], list[bytes]]


@dataclass(frozen=True, eq=False)
class PairSet:
    """The kept pairs of a data set, in file order.

    `rows`: token rows on disk. A pair is item `pair_in_row` of the column `pairs` of row `row_of_pair`; both are (N,)
    int64, the rows rising. `prompt_of_pair` (N,) int64: pairs with equal prompt ids have equal numbers, from 0 by first
    appearance. `content_hash`: of the token ids of the pairs in order, hex.
    """

    rows: datasets.Dataset
    row_of_pair: np.ndarray
    pair_in_row: np.ndarray
    prompt_of_pair: np.ndarray
    content_hash: str

    def __len__(self) -> int:
        return len(self.row_of_pair)

    def pairs(self, ids: np.ndarray) -> list[Pair]:
        """The pairs of these ids, in their order; arrays are read from disk."""
        ids = np.asarray(ids, np.int64)
        wanted, at = np.unique(self.row_of_pair[ids], return_inverse=True)
        if not len(wanted):
            return []
        table = self.rows.select_columns(["prompt_ids", "completion_ids", "pairs"]).with_format("arrow")[wanted]
        rows, (begins, pairs) = _rows_of(table), pairs_of(table)
        result = []
        for row, pair in zip(at, begins[at] + self.pair_in_row[ids], strict=True):
            prompt, completions = rows[row]
            winner, loser = pairs[pair]
            result.append(Pair(prompt, completions[winner], completions[loser]))
        return result

    def lengths(self) -> np.ndarray:
        """Tokens of prompt, winner and loser of each pair, (N, 3) int32."""
        columns, parts = ["prompt_ids", "completion_ids", "pairs"], [np.empty((0, 3), np.int32)]
        for table, numbers, places in _pairs_by_block(self.rows, columns, self.row_of_pair, self.pair_in_row, BLOCK):
            (prompt_at, _), (starts, completions) = lists(table, "prompt_ids"), lists(table, "completion_ids")
            begins, pairs = pairs_of(table)
            listed = pairs[begins[numbers] + places] + starts[numbers][:, None]
            parts.append(np.column_stack([np.diff(prompt_at)[numbers], np.diff(offsets(completions))[listed]]))
        return np.concatenate(parts).astype(np.int32)

    def completions(self) -> Iterator[Completions]:
        """(prompt_ids, the ids of its completions that stand in a kept pair, their keys) of every row with such."""
        columns = ["prompt_ids", "completion_ids", "completion_keys", "pairs"]
        for table, numbers, pair_in_row in _pairs_by_block(self.rows, columns, self.row_of_pair, self.pair_in_row, 256):
            rows, (begins, pairs), (starts, keys) = _rows_of(table), pairs_of(table), lists(table, "completion_keys")
            listed = pairs[begins[numbers] + pair_in_row]
            for row in np.unique(numbers):
                used = np.unique(listed[numbers == row])
                prompt, completions = rows[row]
                yield prompt, [completions[i] for i in used], [keys[int(starts[row] + i)].as_py() for i in used]


def make_pair_set(rows: datasets.Dataset, is_kept: np.ndarray) -> PairSet:
    """The pairs of those rows for which `is_kept` (rows,) is true."""
    row_of_pair, pair_in_row = _number_pairs(rows, is_kept)
    _, first, prompt = np.unique(column_keys(rows, "prompt_key")[row_of_pair], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return PairSet(rows, row_of_pair, pair_in_row, rank[prompt], _content_hash(rows, row_of_pair, pair_in_row))


def _number_pairs(rows: datasets.Dataset, is_kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row of each pair, its place in the row), both (N,) int64."""
    row_parts, place_parts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start, table in blocks(rows, ["pairs"]):
        begins, _ = pairs_of(table)
        counts = np.where(is_kept[start : start + len(table)], np.diff(begins), 0)
        row_parts.append(np.repeat(np.arange(start, start + len(table)), counts))
        place_parts.append(np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))
    return np.concatenate(row_parts), np.concatenate(place_parts)


def _content_hash(rows: datasets.Dataset, row_of_pair: np.ndarray, pair_in_row: np.ndarray) -> str:
    """Of the keys of every pair's winner and loser in order; a key stands for prompt and completion."""
    content = hashlib.blake2b(digest_size=16)
    columns = ["completion_keys", "pairs"]
    for table, numbers, places in _pairs_by_block(rows, columns, row_of_pair, pair_in_row, BLOCK):
        (starts, keys), (begins, pairs) = lists(table, "completion_keys"), pairs_of(table)
        listed = pairs[begins[numbers] + places] + starts[numbers][:, None]
        content.update(keys16(keys)[listed].tobytes())
    return content.hexdigest()


def _pairs_by_block(
    rows: datasets.Dataset, columns: list[str], row_of_pair: np.ndarray, pair_in_row: np.ndarray, size: int
) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
    """(table of those columns, row of each of its pairs in that table, place in the row) of every `size` rows."""
    for start, table in blocks(rows, columns, size):
        begin, end = np.searchsorted(row_of_pair, [start, start + size])
        if begin < end:
            yield table, row_of_pair[begin:end] - start, pair_in_row[begin:end]


def _rows_of(table: pa.Table) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """(prompt_ids, the ids of every completion) of each row, int32."""
    prompt_at, prompts = lists(table, "prompt_ids")
    row_at, completions = lists(table, "completion_ids")
    at, ids, prompt_ids = offsets(completions), completions.flatten().to_numpy(), prompts.to_numpy()
    texts = [ids[begin:end] for begin, end in itertools.pairwise(at)]
    return [(prompt_ids[prompt_at[i] : prompt_at[i + 1]], texts[row_at[i] : row_at[i + 1]]) for i in range(len(table))]
