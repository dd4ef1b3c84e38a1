"""A column that is empty (null, "", [] or {}) in every row is absent, in every kind of source."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.config import SourceConfig
from dpo.sources import filled
from dpo.sources.filled import filled_columns
from dpo.sources.source import open_source
from tests.support.data_fixtures import write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
EMPTY = {"system": "", "note": "", "tools": [], "images": [], "extra": {}, "none": None}
NOTHING = EMPTY | {"late": None, "tags": [], "n": 0, "ok": False}
ROWS = [
    NOTHING | {"prompt": "p"},
    NOTHING | {"prompt": "", "system": None, "tools": None, "late": ""},
    NOTHING | {"prompt": "p", "late": "x", "tags": [""]},
]
FILLED = {"prompt", "late", "tags", "n", "ok"}
"""0 and false are values; so is a list with an empty text in it."""


def columns(path) -> set[str]:
    return open_source(SourceConfig(path=str(path)), "data.train[0]").columns


def arrow_table(chunk_rows: int) -> pa.Table:
    """ROWS with types that Parquet has, in chunks of so many rows; none is an object without keys, as `extra`."""
    text, texts = pa.string(), pa.list_(pa.string())
    types = {"prompt": text, "system": text, "note": pa.large_string(), "tools": texts, "none": pa.null(), "late": text,
             "images": pa.large_list(text), "tags": texts, "n": pa.int64(), "ok": pa.bool_()}  # fmt: skip
    schema = pa.schema(list(types.items()))
    rows = [{name: row[name] for name in types} for row in ROWS]
    parts = [pa.Table.from_pylist(rows[i : i + chunk_rows], schema) for i in range(0, len(rows), chunk_rows)]
    return pa.concat_tables(parts)


def test_json(tmp_path):
    assert columns(write_jsonl(tmp_path / "a.jsonl", ROWS)) == FILLED
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    assert columns(tmp_path / "a.json") == FILLED


def test_tables(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,system,late,quoted\np,,,""\n,,,\np,,x,\n')
    assert columns(tmp_path / "a.csv") == {"prompt", "late"}


@pytest.mark.parametrize("chunk_rows", [1, 2, 3])
def test_parquet_and_saved_sets(tmp_path, chunk_rows):
    table = arrow_table(chunk_rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=chunk_rows)
    rows = datasets.Dataset(table)
    rows.save_to_disk(str(tmp_path / "saved"))
    assert columns(tmp_path / "a.parquet") == columns(tmp_path / "saved") == filled_columns(rows) == FILLED


def test_objects_in_arrow():
    """{} has a type without keys; an object with keys is a value even where they are null."""
    no_keys, keys = pa.struct([]), pa.struct([("a", pa.string())])
    table = pa.table({
        "empty": pa.array([{}, None], no_keys), "null": pa.array([None, None], keys), "one": pa.array([None, {}], keys)
    })  # fmt: skip
    assert filled_columns(datasets.Dataset(table)) == {"one"}


def test_reading_ends_at_the_first_value(monkeypatch):
    """A column of many chunks costs one of them where the first holds a value."""
    seen = []
    is_filled = filled._is_filled
    monkeypatch.setattr(filled, "_is_filled", lambda values: seen.append(len(values)) or is_filled(values))
    chunks = [pa.array(["x"] * 10)] * 1000
    rows = datasets.Dataset(
        pa.table({"a": pa.chunked_array(chunks), "b": pa.chunked_array([pa.array([""] * 10)] * 1000)})
    )
    assert filled_columns(rows) == {"a"}
    assert sorted(seen) == [10] * 1001
