"""The rows of a CSV or TSV file, each with the line in which it begins, read strictly (RFC 4180).

All values are texts. A format that needs a number takes it from a text (`numbers.py`).
"""

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from dpo.base.errors import UserError
from dpo.sources.formats.json_rows import EMPTY
from dpo.sources.formats.text_lines import Line, text_lines

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""The delimiter of the fields, by the suffix of the file."""
ROW_NUMBERS = "Unnamed: 0"
"""The name of a first column without one, as `pandas.read_csv` names it."""
TableRow = tuple[int, list[str]]
"""(line from 1 in which the row begins, its fields)."""


def table_rows(path: str, name: str, delimiter: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table whose first row names the columns. The file may be gzipped.

    Args:
        path: the file.
        name: the file's name in errors.
        delimiter: the character between two fields.

    Yields:
        As `json_rows`: {row: a JSON object, line: the line in which it begins, from 1, columns: the sorted names of its
        columns that are not empty as a JSON list}. An empty field is null.

    Raises:
        UserError: `name:line: what`, for bytes that are not UTF-8 or NUL, a broken gzip, quotes that RFC 4180 forbids,
            an empty or a repeated name of a column, a row with another number of fields, and for a file without rows.
    """
    rows = _fields(path, name, delimiter)
    header = _header(next(rows, None), name)
    num_rows = 0
    for line, values in rows:
        if len(values) != len(header):
            valid = "one field per column, in quotes where it has a delimiter, a quote or a line end"
            raise UserError(f"{name}:{line}", f"{len(values)} fields in a table of {len(header)} columns", valid)
        row = {column: value or None for column, value in zip(header, values, strict=True)}
        columns = json.dumps(sorted(column for column, value in row.items() if value not in EMPTY))
        yield {"row": json.dumps(row, ensure_ascii=False), "line": line, "columns": columns}
        num_rows += 1
    if num_rows == 0:
        raise UserError(name, "empty, it has no rows", "at least one row below the names of the columns")


def _header(row: TableRow | None, name: str) -> list[str]:
    """Returns the names of the columns; the first may be empty, as pandas writes the numbers of rows.

    Raises UserError for none, another empty one and a repeated one, and for one that has semicolons or tabs, with which
    spreadsheets of some languages divide columns.
    """
    line, names = row or (1, [])
    names = [ROW_NUMBERS, *names[1:]] if len(names) > 1 and not names[0] else names
    if not all(names):
        raise UserError(f"{name}:{line}", f"column {names.index('') + 1} has no name", "a first row of names")
    twice = next((column for i, column in enumerate(names) if column in names[:i]), None)
    if twice is not None:
        raise UserError(f"{name}:{line}", f"the column {twice!r} is a duplicate", "different names of columns")
    if len(names) == 1 and re.search("[;\t]", names[0]):
        what = f"one column, whose name has semicolons or tabs: {names[0]!r:.60}"
        raise UserError(f"{name}:{line}", what, "commas between the columns; tabs where the file's name ends in .tsv")
    return names


def _fields(path: str, name: str, delimiter: str) -> Iterator[TableRow]:
    """Yields the fields of each row, without blank rows."""
    lines = text_lines(path, name)
    first = next(lines, None)
    if first is None:
        return
    reader, line = csv.reader(_texts(first, lines, name), delimiter=delimiter, strict=True), first[0]
    while (values := _next_row(reader, f"{name}:{line}")) is not None:
        if values:
            yield line, values
        line = first[0] + reader.line_num


def _texts(first: Line, lines: Iterator[Line], name: str) -> Iterator[str]:
    """Yields the texts of the lines. Raises UserError for one with a NUL byte, which Python's csv module takes."""
    for line, text in itertools.chain([first], lines):
        if "\0" in text:
            raise UserError(f"{name}:{line}", "a NUL byte", "a text file in UTF-8")
        yield text


def _next_row(reader: Iterator[list[str]], place: str) -> list[str] | None:
    """Returns the fields of the next row; None after the last one. Raises UserError at `place` for broken quotes.

    Python's csv module has one limit on the length of a field, for all of its readers: it is lifted for this row alone.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise UserError(place, f"broken table: {error}", "quotes as in RFC 4180, doubled inside a field") from error
    finally:
        csv.field_size_limit(limit)
