"""Reads files of rows in Arrow's streaming format, as `datasets` writes them, mapped into memory."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa


def open_rows(files: Sequence[Path | str]) -> pa.Table:
    """Returns the rows of some files, one file after the other; a column that a file lacks is null in its rows.

    Args:
        files: at least one.
    """
    tables = [pa.ipc.open_stream(pa.memory_map(str(file))).read_all().replace_schema_metadata() for file in files]
    return pa.concat_tables(tables, promote_options="default")
