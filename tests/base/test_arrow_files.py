"""Files of rows that `datasets` writes, read without it."""

from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from dpo.base.arrow_files import open_rows


def written(path: Path, columns: dict[str, list[object]]) -> Path:
    """A file of rows, as `Dataset.map` writes it, with blocks of two rows."""
    rows = datasets.Dataset.from_dict(columns)
    rows.map(lambda row: row, cache_file_name=str(path), load_from_cache_file=False, writer_batch_size=2)
    return path


def test_rows_of_files_in_their_order(tmp_path: Path) -> None:
    """As `datasets` reads them, which has null too where a file lacks a column."""
    parts: list[dict[str, list[object]]] = [
        {"ids": [[1, 2], [], [3]], "weight": [0.5, 1.0, 2.0]},
        {"ids": [[4]]},
    ]
    files = [written(tmp_path / f"{number}.arrow", part) for number, part in enumerate(parts)]
    rows = open_rows(files)
    assert rows.to_pydict() == {"ids": [[1, 2], [], [3], [4]], "weight": [0.5, 1.0, 2.0, None]}
    theirs = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    assert rows.to_pylist() == theirs.to_list()
    assert open_rows([str(files[1])]).num_rows == 1


def test_rows_are_mapped_not_read(tmp_path: Path) -> None:
    before = pa.total_allocated_bytes()
    rows = open_rows([written(tmp_path / "a.arrow", {"text": ["x" * 1000] * 1000})])
    assert rows.nbytes > 10**6 and pa.total_allocated_bytes() - before < 10**5


def test_another_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"no rows")
    with pytest.raises(pa.ArrowInvalid):
        open_rows([tmp_path / "a.arrow"])
