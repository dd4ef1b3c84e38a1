"""The raw rows of a source become cached files of token rows: `Dataset.map` over `tokenize`.

    rows of the source ── num_proc processes ──> tokens-HASH/HASH-00000.arrow, HASH-00001.arrow, ...

A process that tokenizes does not raise the error of a row. It writes it to the row's `error` column, and the
first in file order is raised by `raise_first_error`. HASH is of the content of the source, of the tokenizer, the limits
and `caching.FORMAT`, so a second start, with any number of processes, tokenizes nothing.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dpo.base.errors import InvalidValue, UserError
from dpo.base.workers import Report
from dpo.encode.encoder import Encoder, encoder_content
from dpo.pairs.pair_values import named_values, valued_row
from dpo.pairs.tokens import Limits, TokenizedExample, completion_key, prompt_key, tokenize
from dpo.pairs.workers import tokenize_in_workers
from dpo.sources.caching import cache_path, digest, import_datasets, quiet_progress
from dpo.sources.formats.reading import Reading, read_row
from dpo.sources.formats.row_fields import Row
from dpo.sources.kept import FindFault, find_fault, keep_folder
from dpo.sources.source import Source, decode_row
from dpo.terminal.console import progress

if TYPE_CHECKING:
    import datasets

MAX_NUM_PROC, SMALL_SET = 8, 4000  # with fewer rows, processes cost more than they save
ROWS_PER_REPORT = 1000  # rows per progress report
BLOCK = 8192  # rows per block (`blocks`)

Tokenize = Callable[[Row, int], dict[str, Any]]
"""A record of `Source.rows` and its number -> a row of COLUMNS."""

_INT, _IDS = pa.int32(), pa.list_(pa.int32())
COLUMNS = pa.schema(
    {
        "prompt_ids": _IDS,
        "completion_ids": pa.list_(_IDS),
        "pairs": pa.list_(_IDS),  # the kept ones, [winner, loser]
        "dropped": pa.list_(pa.string()),  # one reason per dropped pair
        "prompt_key": pa.binary(),  # 16 bytes, of prompt_ids
        "full_prompt_key": pa.binary(),  # 16 bytes, of the prompt before truncation
        "completion_keys": pa.list_(pa.binary()),
        "where": pa.int64(),  # line or row number
        "error": pa.string(),  # of a broken row, else null
        "valid": pa.string(),  # the valid values, where `error` does not say
        "prompt_truncated": pa.bool_(),
        "completions_truncated": _INT,
        "over_positions": _INT,
        "repeated_pairs": _INT,  # the same [winner, loser] again
        "contradicting_pairs": _INT,  # [a, b] whose reverse is listed too
        "boundary_merges": _INT,
        "chats": pa.bool_(),  # by the chat template
        "texts": pa.bool_(),  # no chat: as they are
        "rendered_chats": pa.bool_(),  # texts with control tokens in their prompt
        "control_texts": pa.bool_(),  # a control token in a text stays text
        "written_bos": pa.bool_(),  # the text brings its BOS
        "two_bos": pa.bool_(),
        "trimmed_ends": pa.bool_(),  # a text goes on after its stop token
        "unwritten": pa.bool_(),  # the chat template leaves out a content or a tool call
    }
)


def tokenize_source(
    source: Source,
    reading: Reading,
    encoder: Encoder,
    limits: Limits,
    num_proc: int | None,
    fault_of: FindFault = find_fault,
) -> list[str]:
    """Returns the files of the token rows of a source (COLUMNS, and `named_values`), in its order; makes them where
    they are not in the cache, or are damaged there.

    Args:
        source: the raw rows.
        reading: the way in which the rows are read.
        encoder: the tokenizer with its BOS and EOS; without a tokenizer for rows of ids.
        limits: the limits on lengths and ids.
        num_proc: processes that tokenize; None: 1 below SMALL_SET rows, else one per CPU, at most MAX_NUM_PROC.
        fault_of: checks the folder of the token rows, see `dpo.sources.kept`.

    Raises:
        RunError: a process that tokenizes was killed or ran out of memory.
    """
    named = named_values(reading.names)
    fingerprint = digest((source.content, reading.content(), encoder_content(encoder), str(astuple(limits))))
    folder = cache_path(f"tokens-{fingerprint}")
    row = functools.partial(tokenize_row, reading=reading, has_lines=source.has_lines, encoder=encoder, limits=limits)
    if named:
        row = functools.partial(valued_row, named=named, has_lines=source.has_lines, tokenize_row=row)
    num = processes(num_proc, source.num_rows)
    keep_folder(folder, lambda draft: _write(draft / fingerprint, source, reading, row, num), fault_of)
    return sorted(str(path) for path in folder.glob("*.arrow"))


def processes(num_proc: int | None, num_rows: int) -> int:
    """Returns how many processes tokenize so many rows; 1 is this process alone."""
    if num_proc is None:
        num_proc = 1 if num_rows < SMALL_SET else min(MAX_NUM_PROC, len(os.sched_getaffinity(0)))
    return max(1, min(num_proc, num_rows))


def _write(path: Path, source: Source, reading: Reading, row: Tokenize, num: int) -> None:
    """Writes the token rows of a source to `num` files of about equal length, `path`-00000.arrow and so on, each in a
    process of its own.
    """
    import_datasets()
    import datasets

    rows = source.rows.with_format(None)
    if not source.has_lines:
        rows = rows.select_columns([name for name in rows.column_names if name in reading.own_columns])
    bounds = [len(rows) * i // num for i in range(num + 1)]
    parts = [range(begin, end) for begin, end in itertools.pairwise(bounds)]
    features = _features(named_values(reading.names))
    write = functools.partial(_write_part, rows, row, features)
    works = [functools.partial(write, f"{path}-{i:05d}.arrow", part) for i, part in enumerate(parts)]
    label, is_shown = f"tokenizing {Path(source.path).name}", datasets.utils.is_progress_bar_enabled()
    with progress(label, len(rows), "rows", is_shown) as bar:
        if num == 1:
            works[0](bar.advance)
        else:
            tokenize_in_workers(works, bar.advance)


def _features(named: Iterable[str]) -> "datasets.Features":
    """Returns the columns of token rows for `datasets`; `named` are those of weight and margin."""
    import datasets

    values = [pa.field(name, pa.float64()) for name in named]
    return datasets.Features.from_arrow_schema(pa.schema([*COLUMNS, *values]))


def _write_part(
    rows: "datasets.Dataset", row: Tokenize, features: "datasets.Features", path: str, part: range, report: Report
) -> None:
    """Writes the token rows of a part of the raw rows."""

    def reported(record: Row, index: int) -> dict[str, Any]:
        if index % ROWS_PER_REPORT == ROWS_PER_REPORT - 1:
            report(ROWS_PER_REPORT)
        return row(record, part[index])

    with quiet_progress():
        rows.select(part).map(
            reported,
            with_indices=True,
            remove_columns=rows.column_names,
            features=features,
            cache_file_name=path,
            load_from_cache_file=False,
            new_fingerprint=Path(path).stem,
        )
    report(len(part) % ROWS_PER_REPORT)


def tokenize_row(
    record: Row, index: int, reading: Reading, has_lines: bool, encoder: Encoder, limits: Limits
) -> dict[str, Any]:
    """Returns one record of `Source.rows` as a row of COLUMNS; a broken record has `error` set, and no tokens.

    Args:
        record: a row of `Source.rows`.
        index: its number, from 0.
        reading: the way in which the rows are read.
        has_lines: `Source.has_lines`.
        encoder: the tokenizer with its BOS and EOS.
        limits: the limits on lengths and ids.

    Returns:
        The value of each column of COLUMNS; arrays of ids are 1-D int32.
    """
    row, where = decode_row(record, index, has_lines)
    try:
        tokenized = tokenize(read_row(reading, row), encoder, limits)
    except InvalidValue as broken:
        nothing = _columns(TokenizedExample([], [], (), (), ()))
        return nothing | {"where": where, "error": broken.what, "valid": broken.valid}
    return _columns(tokenized) | {"where": where, "error": None, "valid": None}


def _columns(tokenized: TokenizedExample) -> dict[str, Any]:
    pairs, prompt = tokenized.pairs, np.asarray(tokenized.prompt_ids, np.int32)
    return {
        "prompt_ids": prompt,
        "completion_ids": [np.asarray(ids, np.int32) for ids in tokenized.completion_ids],
        "pairs": [list(pair) for pair in pairs],
        "dropped": list(tokenized.dropped),
        "prompt_key": prompt_key(prompt),
        "full_prompt_key": prompt_key(np.asarray(tokenized.full_prompt_ids, np.int32)),
        "completion_keys": [completion_key(prompt, np.asarray(ids)) for ids in tokenized.completion_ids],
        "prompt_truncated": tokenized.prompt_truncated,
        "completions_truncated": tokenized.completions_truncated,
        "over_positions": tokenized.over_positions,
        "repeated_pairs": len(pairs) - len(set(pairs)),
        "contradicting_pairs": sum((loser, winner) in pairs for winner, loser in pairs if winner != loser),
        "boundary_merges": tokenized.boundary_merges,
        **{kind: tokenized.kind == kind for kind in ("chats", "texts", "rendered_chats")},
        "control_texts": tokenized.has_control_text,
        "written_bos": tokenized.has_written_bos,
        "two_bos": tokenized.has_two_bos,
        "trimmed_ends": tokenized.has_trimmed_end,
        "unwritten": tokenized.has_unwritten,
    }


def raise_first_error(rows: pa.Table, source: Source) -> None:
    """Raises UserError at `file:line` for the first broken row of the token rows of a source."""
    for _, table in blocks(rows, ["error", "valid", "where"]):
        errors = table.column("error")
        if errors.null_count < len(errors):
            first = int(np.flatnonzero(errors.is_valid().to_numpy())[0])
            what, valid, where = (table.column(name)[first].as_py() for name in ("error", "valid", "where"))
            raise UserError(source.place(where), what, valid)


# --- columns as numpy, a block of rows at a time, so that a large set stays on disk ---------------------------------


def blocks(rows: pa.Table, columns: list[str], size: int = BLOCK) -> Iterator[tuple[int, pa.Table]]:
    """Yields some columns, block by block: (number of the block's first row, its table).

    Args:
        rows: the token rows of a source.
        columns: names of columns of `rows`.
        size: rows per block; the last block may be shorter.
    """
    view = rows.select(columns)
    for first in range(0, len(rows), size):
        yield first, view.slice(first, size)


def lists(table: pa.Table | pa.RecordBatch, column: str) -> tuple[np.ndarray, pa.Array]:
    """Returns a column of lists as offsets (rows + 1,), where each row's items begin and end, and all items.

    The items of a record batch are not copied.
    """
    array = table.column(column)
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    return offsets(array), array.flatten()


def offsets(array: pa.ListArray) -> np.ndarray:
    starts: np.ndarray = array.offsets.to_numpy()
    from_first: np.ndarray = (starts - starts[0]).astype(np.int64)
    return from_first


def pairs_of(table: pa.Table | pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Returns offsets (rows + 1,), where each row's pairs begin and end, and the pairs of all rows (P, 2)."""
    begins, items = lists(table, "pairs")
    return begins, items.flatten().to_numpy().reshape(-1, 2)


def keys16(array: pa.Array) -> np.ndarray:
    """Returns keys of 16 bytes as (N,) of dtype S16."""
    buffers = array.buffers()
    start = int(np.frombuffer(buffers[1], np.int32)[array.offset]) if len(array) else 0
    return np.frombuffer(buffers[2], "S16", len(array), start) if len(array) else np.empty(0, "S16")


def column_keys(rows: pa.Table, column: str) -> np.ndarray:
    """Returns a column of keys as (rows,) of dtype S16."""
    parts = [keys16(table.column(column).combine_chunks()) for _, table in blocks(rows, [column])]
    return np.concatenate(parts) if parts else np.empty(0, "S16")
