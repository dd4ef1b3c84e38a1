"""The token rows of all sources -> the files of a `PairSet`, whose docstring has an example."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo.pairs.pair_set import VALUES
from dpo.pairs.pair_values import NEUTRAL
from dpo.pairs.shares import times_in_epoch
from dpo.pairs.token_rows import keys16, lists, offsets, pairs_of


@dataclass(frozen=True, eq=False)
class Part:
    """The pairs of a source that belong to a set."""

    token_files: Sequence[str]
    """The Arrow files of the source's token rows, in the order of the rows."""
    is_kept: np.ndarray
    """(rows,) bool: whether the pairs of a row belong to the set."""
    num_pairs: int | None = None
    """The number of pairs of the source in an epoch, see `shares`; None: each pair once."""
    has_losers: bool = True
    """Whether the set has the losers; else the winner of each pair stands in the loser's place."""


@dataclass(frozen=True, eq=False)
class Written:
    """The contents of a set that was written."""

    num_pairs: int
    prompts: np.ndarray
    """The keys of its distinct prompts, sorted, S16."""


def write_pair_set(folder: Path, sources: Sequence[Part], values: Sequence[str], seed: int) -> Written:
    """Writes the set of the pairs of all sources, as a new folder.

    Args:
        folder: the folder to make; it must not exist.
        sources: the pairs of each source.
        values: the columns of VALUES that the set has; a source whose token rows lack one has its neutral value.
        seed: `train.seed`, by which the pairs of an epoch are chosen.

    Returns:
        The number of pairs and the keys of their prompts.
    """
    parts, first_row, first_byte = [_no_pairs(values)], 0, 0
    for source in sources:
        parts.append(_columns_of(source, (first_row, first_byte), values, seed))
        first_row += len(source.is_kept)
        first_byte += sum(Path(name).stat().st_size for name in source.token_files)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    prompts, first, prompt = np.unique(columns.pop("prompt_key"), return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first))
    folder.mkdir()
    for name, column in (columns | {"prompt_of_pair": rank[prompt]}).items():
        np.save(folder / f"{name}.npy", column)
    return Written(len(prompt), prompts)


def _no_pairs(values: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the columns of no pairs, which give an empty set its dtypes and shapes."""
    columns: dict[str, np.ndarray] = {
        "row_of_pair": np.empty(0, np.int32),
        "pair_in_row": np.empty(0, np.int32),
        "sizes": np.empty((0, 3), np.int32),
        "places": np.empty((0, 3), np.int64),
        "keys": np.empty((0, 2), "S16"),
        "prompt_key": np.empty(0, "S16"),
    }
    return columns | dict.fromkeys(values, np.empty(0, np.float64))


def _columns_of(source: Part, begin: tuple[int, int], values: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Returns the columns of the pairs of an epoch of a source, whose first row and byte are `begin`."""
    parts = [part for part in _parts(source, begin, values) if len(part["row_of_pair"])]
    columns = {name: np.concatenate([part[name] for part in (_no_pairs(values), *parts)]) for name in _no_pairs(values)}
    keys = columns["keys"]
    columns = columns if source.has_losers else _without_losers(columns)
    if source.num_pairs in (None, len(keys)):
        return columns
    times = times_in_epoch(keys, source.num_pairs, seed)  # the same choice with and without losers
    return {name: np.repeat(column, times, axis=0) for name, column in columns.items()}


def _parts(source: Part, begin: tuple[int, int], values: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of the kept pairs of each record batch of a source, whose first row and byte are `begin`."""
    num_rows, (first_row, first_byte) = 0, begin
    for name in source.token_files:
        with pa.memory_map(name) as file:
            memory = file.read_buffer()
            file.seek(0)
            for batch in pa.ipc.open_stream(file):
                is_kept = source.is_kept[num_rows : num_rows + len(batch)]
                yield _part(batch, is_kept, (first_row + num_rows, first_byte), memory, values)
                num_rows += len(batch)
            first_byte += memory.size
    assert num_rows == len(source.is_kept)


def _without_losers(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the columns with the winner of each pair in the loser's place."""
    winner = {"sizes": [0, 1, 1], "places": [0, 1, 1], "keys": [0, 0]}
    return columns | {name: columns[name][:, indices] for name, indices in winner.items()}


def _values_of(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Returns a column of VALUES of each row of a record batch, (rows,) float64."""
    column = VALUES[name]
    if column not in batch.schema.names:
        return np.full(len(batch), NEUTRAL[column])
    values: np.ndarray = batch.column(column).to_numpy()
    return values


def _part(
    batch: pa.RecordBatch, is_kept: np.ndarray, begin: tuple[int, int], memory: pa.Buffer, values: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns the columns of the kept pairs of a record batch.

    Args:
        batch: token rows, not copied from `memory`.
        is_kept: (rows of the batch,) bool.
        begin: the batch's first row and the first byte of its file, both counted through all files.
        memory: the whole file, mapped.
        values: the columns of VALUES that the set has.
    """
    first_row, first_byte = begin
    begins, pairs = pairs_of(batch)
    counts = np.where(is_kept, np.diff(begins), 0)
    row = np.repeat(np.arange(len(batch), dtype=np.int32), counts)
    pair_in_row = np.arange(len(row), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
    first_of_row, completions = lists(batch, "completion_ids")
    listed = pairs[begins[row] + pair_in_row] + first_of_row[row][:, None]  # (n, 2) indices of the batch's completions
    prompt_place, prompt_size = _places_of(batch.column("prompt_ids"), memory)
    place, size = _places_of(completions, memory)
    columns: dict[str, np.ndarray] = {
        "row_of_pair": row + np.int32(first_row),
        "pair_in_row": pair_in_row,
        "sizes": np.column_stack([prompt_size[row], size[listed]]).astype(np.int32),
        "places": first_byte + np.column_stack([prompt_place[row], place[listed]]),
        "keys": keys16(lists(batch, "completion_keys")[1])[listed],
        "prompt_key": keys16(batch.column("prompt_key"))[row],
    }
    return columns | {name: _values_of(batch, name)[row] for name in values}


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
