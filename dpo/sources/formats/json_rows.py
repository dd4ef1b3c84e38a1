"""The rows of a JSON or JSONL file, each with its line, read strictly: errors name the file and the line."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from dpo.base.errors import InvalidValue, UserError
from dpo.sources.formats.text_lines import SPACE, Line, text_lines

BEGINS = ("{", "[")
"""The first character of a file of JSON is one of these."""
EMPTY_TEXTS = ("", "[]", "{}", "null")
"""The texts without a value; the last three are JSON, as tables keep lists and objects."""
EMPTY: tuple[object, ...] = (None, [], {}, *EMPTY_TEXTS)
"""The values of a column that is as good as absent."""
FILES = "JSON or JSONL, *.csv, *.tsv (all of them also gzipped), Parquet"
Located = tuple[int, str, Any]
"""(line from 1, the row's text, its value)."""


def json_rows(path: str, name: str) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON array or of the lines of a JSONL file, which may be gzipped. The content of the file
    decides, not its name.

    Args:
        path: the file.
        name: the file's name in errors.

    Yields:
        {row: the object's text, line: the line in which it begins, from 1, columns: the sorted keys of its values that
        are not EMPTY as a JSON list}.

    Raises:
        UserError: `name:line: what`, for broken JSON (also for NaN, a repeated key, half a surrogate pair, bytes that
            are not UTF-8, a broken gzip), for a row that is not an object, and for a file without rows.
    """
    num_rows = 0
    for line, text, row in _located_rows(path, name):
        if not isinstance(row, dict):
            raise UserError(f"{name}:{line}", "the row is not an object", "{field: value, …}")
        columns = json.dumps(sorted(key for key, value in row.items() if value not in EMPTY))
        yield {"row": text, "line": line, "columns": columns}
        num_rows += 1
    if num_rows == 0:
        raise UserError(name, "empty, it has no rows", "at least one row")


def _located_rows(path: str, name: str) -> Iterator[Located]:
    """Yields the rows of an array or of lines, by the first character that is not white space: `[` begins an array."""
    lines = text_lines(path, name)
    first = next(lines, None)
    if first is None:
        return
    begins = first[1].lstrip(SPACE)[0]
    if begins not in BEGINS:
        raise UserError(f"{name}:{first[0]}", f"not JSON, which begins with {{ or [, but {begins!r}", FILES)
    yield from _array_rows(first, lines, name) if begins == "[" else _line_rows(first, lines, name)


def _line_rows(first: Line, lines: Iterable[Line], name: str) -> Iterator[Located]:
    """Yields the rows of JSONL, one value per line; skips blank lines."""
    yield _line_row(*first, name)
    for line, text in lines:
        if text.strip(SPACE):
            yield _line_row(line, text, name)


def _line_row(line: int, text: str, name: str) -> Located:
    """Returns the row of a line of JSONL."""
    text = text.strip(SPACE)
    value, end = _decode(text, 0, line, name)
    if end < len(text):
        raise UserError(f"{name}:{line}", f"broken JSON: more after the row, at column {end + 1}", "one row per line")
    return line, text, value


def _array_rows(first: Line, lines: Iterable[Line], name: str) -> Iterator[Located]:
    """Yields the rows of one JSON array. Holds its text in memory, and decodes it element by element, so that the line
    of each is known.
    """
    line, text = first[0], first[1] + "".join(text for _, text in lines)
    at, ends = text.index("[") + 1, ","
    while ends == ",":
        at, line = _skip_space(text, at, line)
        if text.startswith("]", at) and text[:at].rstrip(SPACE).endswith("["):
            ends, at = "]", at + 1  # an empty array
            break
        value, end = _decode(text, at, line, name)
        yield line, text[at:end], value
        line += text.count("\n", at, end)
        at, line = _skip_space(text, end, line)
        ends, at = text[at : at + 1], at + 1
    if ends != "]":
        raise UserError(f"{name}:{line}", "broken JSON: a comma or ] is missing between the rows of the array")
    at, line = _skip_space(text, at, line)
    if at < len(text):
        raise UserError(f"{name}:{line}", "broken JSON: something follows the array", "one array, or one row per line")


def _skip_space(text: str, at: int, line: int) -> tuple[int, int]:
    """Returns the next position that is not white space, and its line."""
    while at < len(text) and text[at] in SPACE:
        line += text[at] == "\n"
        at += 1
    return at, line


def _decode(text: str, at: int, line: int, name: str) -> tuple[Any, int]:
    """Returns the value that begins at position `at`, which is on `line`, and the position where it ends."""
    try:
        value, end = DECODER.raw_decode(text, at)
        if "\\u" in text[at:end]:
            json.dumps(value, ensure_ascii=False).encode()  # raises for half a surrogate pair, which no tokenizer takes
        return value, end
    except json.JSONDecodeError as error:
        line += text.count("\n", at, error.pos)
        fault = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        raise UserError(f"{name}:{line}", f"broken JSON: {fault} at column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{name}:{line}", "broken JSON: half a surrogate pair", "whole characters") from error
    except InvalidValue as error:
        raise UserError(f"{name}:{line}", f"broken JSON: {error.what}", error.valid) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}:{line}", f"broken JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object. Raises InvalidValue where a key is repeated."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidValue(f"the key {twice!r} is a duplicate")
    return row


def _no_constant(name: str) -> NoReturn:
    """Raises InvalidValue for NaN, Infinity and -Infinity, which Python's decoder would take."""
    raise InvalidValue(f"{name} is not JSON", "a finite number or null")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
