"""A source of the config -> its raw rows, each with its line or row number.

JSON, JSONL, CSV and TSV files (gzip too) go through our own readers, because `datasets` neither gives line numbers nor
refuses wrong types; each row is then kept as a JSON text. Parquet files, saved folders, folders of data files and hub
ids go through `datasets`. The name of a cached file is a hash of the content that was read and of `caching.FORMAT`, the
version of the cached form, so that neither a changed file nor another version of the trainer meets a stale cache.

Texts that are in the cache are read without `datasets`, whose import takes longer than all else that a start does with
its data.
"""

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from dpo.base.arrow_files import open_rows
from dpo.base.errors import UserError
from dpo.base.files import NEED, has_need
from dpo.base.full_disk import full_code
from dpo.base.space import describe_full
from dpo.base.units import shown_bytes
from dpo.config import SourceConfig
from dpo.hub.snapshots import offline
from dpo.sources.caching import (
    cache_path,
    datasets_cache,
    digest,
    file_hashes,
    import_datasets,
    load,
    quiet_progress,
)
from dpo.sources.filled import filled_columns
from dpo.sources.formats.json_rows import BEGINS, json_rows
from dpo.sources.formats.row_fields import Row
from dpo.sources.formats.table_rows import DELIMITERS, table_rows
from dpo.sources.formats.text_lines import first_character
from dpo.sources.hub_sets import check_path, download, prepared_folder, read_prepared
from dpo.sources.hub_sums import check_files, keep_digests
from dpo.sources.kept import FindFault, arrow_files, find_fault, keep_sums, remove_damaged
from dpo.sources.saved import is_saved, open_saved

if TYPE_CHECKING:
    import datasets

JSON_COLUMNS: Mapping[str, str] = {"row": "string", "line": "int64", "columns": "string"}
"""The columns of the rows of a text, and their types."""
PARQUET = b"PAR1"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of locks on a file system without them, such as an NFS whose server has no lock daemon."""


@dataclass(frozen=True)
class Source:
    """The raw rows of one source."""

    path: str
    num_rows: int
    first_record: Row
    """The first of `rows`; empty where there are none."""
    open: Callable[[], "datasets.Dataset"]
    """Opens `rows`."""
    columns: set[str]
    """The columns of the source that are not empty (null, "", [] or {}) in every row."""
    content: str
    """32 hex digits; equal for two sources only if their content and FORMAT are equal."""
    has_lines: bool
    """Whether a row is named by its line (from 1) or by its number (from 0)."""

    @cached_property
    def rows(self) -> "datasets.Dataset":
        """Returns the rows: with JSON_COLUMNS where `has_lines`, else with the columns of the source."""
        return self.open()

    def place(self, where: int) -> str:
        """Returns the place of a row for errors, `file:line` or `path:row N`, from its line or number."""
        return f"{self.path}:{where}" if self.has_lines else f"{self.path}:row {where}"

    def first_row(self) -> Row:
        """Returns the first row as the source has it."""
        return decode_row(self.first_record, 0, self.has_lines)[0]


def decode_row(record: Row, index: int, has_lines: bool) -> tuple[Row, int]:
    """Returns a row as the source has it, and its line or number.

    Args:
        record: a row of `Source.rows`.
        index: its number, from 0.
        has_lines: `Source.has_lines`: whether the record has the columns JSON_COLUMNS.

    Returns:
        The row, and its line (from 1) where there are lines, else `index`.
    """
    return (json.loads(record["row"]), record["line"]) if has_lines else (record, index)


def open_source(config: SourceConfig, key: str, fault_of: FindFault = find_fault) -> Source:
    """Reads the rows of a source, or finds them in the cache, where they are read again if they are damaged.

    Args:
        config: the source.
        key: its key in the config, as `data.train[0]`, for errors.
        fault_of: checks the rows in the cache, see `dpo.sources.kept`.

    Raises:
        UserError: there is no such file, folder, hub id or split, it cannot be read, its JSON is broken, a row is not
            an object, there are no rows, or the cache cannot be written to.
    """
    path = Path(config.path).expanduser()
    try:
        if path.is_file():
            source = _open_file(config, path, key, fault_of)
        elif path.is_dir():
            source = _open_folder(config, path, key, fault_of)
        else:
            source = _open_hub(config, key, fault_of)
    except OSError as error:
        fault = _cache_fault(error, path)
        if fault:
            raise fault from error
        if not isinstance(error, PermissionError):
            raise
        valid = "a file or folder that this user may read"
        raise UserError(f"{key}.path", f"{config.path}: cannot be read: {error.strerror}", valid) from error
    if source.num_rows == 0:
        raise UserError(config.path, "empty, it has no rows", "at least one row")
    return source


# --- the kinds of sources -------------------------------------------------------------------------------------------


def _open_file(config: SourceConfig, path: Path, key: str, fault_of: FindFault) -> Source:
    """Opens one Parquet, JSON, JSONL, CSV or TSV file."""
    if config.split != "train" or config.name is not None:
        wrong = "split" if config.split != "train" else "name"
        raise UserError(f"{key}.{wrong}", f"{config.path} is one file", f"no {wrong}")
    with path.open("rb") as file:
        is_parquet = file.read(len(PARQUET)) == PARQUET
    if not is_parquet:
        return _open_text(config.path, path, fault_of)
    import_datasets()
    content = digest(file_hashes([path]))

    def read(folder: str) -> "datasets.Dataset":
        return load(config.path, key, "parquet", data_files=str(path), split="train", cache_dir=folder)

    rows = _kept(content, read, fault_of)
    return _of_columns(config, rows, content)


def _open_text(name: str, path: Path, fault_of: FindFault) -> Source:
    """Opens one file with our own readers; `datasets` caches its rows under the hash of its content."""
    options = _table_options(path)
    content = digest([*file_hashes([path]), *options.values()])
    folder = cache_path(f"rows-{content}")
    remove_damaged(folder, fault_of)
    files = arrow_files(folder) or _write_text(name, path, options, content, fault_of)
    table = open_rows(files)
    keys = pc.unique(table.column("columns")).to_pylist()
    columns = {column for text in keys for column in json.loads(text)}
    first = table.slice(0, 1).to_pylist()[0] if len(table) else {}
    return Source(name, len(table), first, lambda: _rows_of(files), columns, content, has_lines=True)


def _write_text(name: str, path: Path, options: Mapping[str, str], content: str, fault_of: FindFault) -> Sequence[Path]:
    """Has `datasets` write the rows of a text to its cache, and returns their files."""
    import_datasets()
    import datasets

    features = datasets.Features({column: datasets.Value(kind) for column, kind in JSON_COLUMNS.items()})
    generate = table_rows if options else json_rows

    def read(folder: str) -> "datasets.Dataset":
        arguments = {"path": str(path), "name": name, **options}
        return datasets.Dataset.from_generator(generate, features, folder, gen_kwargs=arguments, fingerprint=content)

    try:
        return [Path(file["filename"]) for file in _kept(content, read, fault_of).cache_files]
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (UserError, OSError)):
            raise error.__cause__ from None
        raise


def _rows_of(files: Sequence[Path]) -> "datasets.Dataset":
    """Returns the rows in files that `datasets` wrote."""
    import_datasets()
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


def _table_options(path: Path) -> dict[str, str]:
    """Returns the delimiter of a CSV or TSV file; nothing for JSON, which its first character tells, not its name."""
    if first_character(str(path)) in BEGINS:
        return {}
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return {"delimiter": DELIMITERS[suffix]} if suffix in DELIMITERS else {}


def _open_folder(config: SourceConfig, path: Path, key: str, fault_of: FindFault) -> Source:
    """Opens a folder that `save_to_disk` wrote, or a folder of data files, which `load_dataset` reads."""
    import_datasets()
    if is_saved(path):
        rows = open_saved(config, path, key)
        content = digest([*file_hashes(file["filename"] for file in rows.cache_files), str(rows.features)])
    else:
        files = digest(file_hashes(file for file in sorted(path.rglob("*")) if file.is_file()))

        def read(folder: str) -> "datasets.Dataset":
            return load(config.path, key, str(path), config.name, split=config.split, cache_dir=folder)

        rows = _kept(files, read, fault_of)
        content = digest([files, str(config.name), config.split])
    return _of_columns(config, rows, content)


def _open_hub(config: SourceConfig, key: str, fault_of: FindFault) -> Source:
    """Opens a data set of the Hugging Face hub: its rows in the cache, without a request, or else downloads it.

    Rows in the cache that are damaged are an error: the folder is that of other programs too.
    """
    check_path(config.path, key)
    import_datasets()
    folder = prepared_folder(config)
    if folder is not None:
        check_files(folder, config, key, fault_of)
    rows = download(config, key) if folder is None else read_prepared(folder, config, key)
    keep_digests(rows, config.split)
    return _of_columns(config, rows, digest([rows._fingerprint]))


def _of_columns(config: SourceConfig, rows: "datasets.Dataset", content: str) -> Source:
    """Returns the source of rows that have columns of their own."""
    first = rows[0] if len(rows) else {}
    return Source(config.path, len(rows), first, lambda: rows, filled_columns(rows), content, has_lines=False)


# --- the cache --------------------------------------------------------------------------------------------------------


def _cache_fault(failure: OSError, source: Path) -> UserError | None:
    """Returns the error of a cache of data sets that cannot be written to, is full, or cannot be locked; None for
    another failure. The rows of `source`, where that is a file, take about as much as the file.
    """
    cache, place = datasets_cache(), Path(str(failure.filename))
    if failure.errno in NO_LOCKS:
        what = f"{cache}: files cannot be locked there: {failure.strerror}"
        return UserError("HF_HOME", what, "a folder on a file system with locks, such as a local disk")
    if full_code(failure) is not None:  # arrow's error has no file name
        if source.is_file() and not has_need(failure):
            failure.add_note(f"{NEED}about {shown_bytes(source.stat().st_size)}")
        valid = "a folder with more room, or free space there"
        return UserError("HF_HOME", str(describe_full(failure, cache)), "" if failure.errno == errno.EFBIG else valid)
    if place.is_relative_to(cache) or cache.is_relative_to(place):  # a file in the cache, or a parent to be made
        return UserError("HF_HOME", f"cannot write to {cache}: {failure.strerror}", "a folder to write in")
    return None


def _kept(content: str, read: Callable[[str], "datasets.Dataset"], fault_of: FindFault) -> "datasets.Dataset":
    """Returns the rows that `datasets` keeps in a cache folder for this content alone; by itself it would trust a
    file's modification time.

    Args:
        content: the hash of the content.
        read: returns the rows from the folder that it is given, and makes them where they are not there.
        fault_of: checks the folder.
    """
    folder = cache_path(f"rows-{content}")
    remove_damaged(folder, fault_of)
    with quiet_progress(), offline():
        rows = read(str(folder))
    keep_sums(rows)
    return rows
