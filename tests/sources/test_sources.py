"""How rows are read: every kind of source gives the same rows, every kind of fault one line with its place."""

import errno
import fcntl
import gzip
import hashlib
import json
import logging.handlers
import os

import datasets
import pytest

from dpo.base.errors import UserError
from dpo.base.sums import SUMS
from dpo.config import SourceConfig
from dpo.hub.snapshots import PREPARE
from dpo.sources import caching
from dpo.sources import source as sources
from dpo.sources.formats.json_rows import json_rows
from dpo.sources.kept import arrow_files
from dpo.sources.source import decode_row, open_source
from tests.support.caches import cache_of_datasets
from tests.support.data_fixtures import write_gzip, write_jsonl

ROWS = [{"prompt": "pé", "chosen": "a\n", "rejected": "\U0001f600", "n": i} for i in range(5)]
pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")


def opened(config):
    return open_source(config if isinstance(config, SourceConfig) else SourceConfig(path=str(config)), "data.train[0]")


def read(config):
    """(the rows, the places of the rows) of a source."""
    source = opened(config)
    decoded = [decode_row(record, i, source.has_lines) for i, record in enumerate(source.rows)]
    return [row for row, _ in decoded], [source.place(where) for _, where in decoded]


def fault(config) -> str:
    with pytest.raises(UserError) as error:
        opened(config)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_jsonl_keeps_lines_and_skips_blank_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + b'{"a": 1}\r\n' + b"  \n" + b' {"b": "\\u00e9"} ')
    assert read(path) == ([{"a": 1}, {"b": "é"}], [f"{path}:2", f"{path}:4"])
    assert open_source(SourceConfig(path=str(path)), "k").columns == {"a", "b"}


@pytest.mark.parametrize("index", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/data.arrow", "../other"])
def test_a_saved_set_names_files_of_its_own_folder(tmp_path, index, name):
    """Another data set beside it is not read in its place."""
    for folder in ("other", "saved/train" if index == "dataset_dict.json" else "saved"):
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / folder))
    named = {"splits": [name]} if index == "dataset_dict.json" else {"_data_files": [{"filename": name}]}
    path = tmp_path / "saved" / index
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | named))
    valid = "names of files and splits in the same folder"
    assert fault(tmp_path / "saved") == (
        f"data.train[0].path: {tmp_path}/saved: names the file {name!r}; valid: {valid}"
    )


@pytest.mark.parametrize(
    "content",
    [pytest.param("[" * 100_000, id="deep"), "[]", "3", '{"_data_files": 3}', '{"_data_files": [3]}', "{}", ""],
)
def test_a_saved_set_with_a_broken_index_is_refused(tmp_path, content):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text(content)
    assert "saved: cannot be loaded: " in fault(tmp_path / "saved")


def test_array_keeps_the_line_of_every_element(tmp_path):
    """Line 2 holds two elements, the third begins on line 3 and goes on to line 5, the fourth stands on line 6."""
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 0}, {"a": 1},\n{"a":\n [2,\n 3]},\n\t{"a": 4}\n]\n')
    rows, places = read(path)
    assert [row["a"] for row in rows] == [0, 1, [2, 3], 4]
    assert places == [f"{path}:{line}" for line in (2, 2, 3, 6)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet"])
def test_content_decides_not_the_name(tmp_path, name):
    """JSONL, an array, and both gzipped, under names that may lie."""
    lines, array = "".join(json.dumps(row) + "\n" for row in ROWS).encode(), json.dumps(ROWS, indent=1).encode()
    for content in (lines, array, gzip.compress(lines, mtime=0), gzip.compress(array, mtime=0)):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name)[0] == ROWS


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b'{"a": 1}\n{"a": }\n', 2, "broken JSON: Expecting value at column 7"),
        (b'{"a": 1}\n{"a": 1\n', 2, "broken JSON: Expecting ',' delimiter"),
        (b'{"a": 1} {"a": 2}\n', 1, "broken JSON: more after the row, at column 9; valid: one row per line"),
        (b'{"a": 1}\n\n3\n', 3, "the row is not an object"),
        (b'{"a": 1}\n[1]\n', 2, "the row is not an object"),
        (b'{"a": NaN}', 1, "broken JSON: NaN is not JSON"),
        (b'{"a": [-Infinity]}', 1, "broken JSON: -Infinity is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', 1, "broken JSON: the key 'a' is a duplicate"),
        (b'{"a": 1}\n{"a": "\\ud83d"}', 2, "broken JSON: half a surrogate pair"),
        (b'{"a": 1}\n{"a": "\xff"}', 2, "not UTF-8 (invalid start byte); valid: a file in UTF-8"),
        (b'{"a": ' + b"[" * 100_000, 1, "broken JSON: "),
        (b'[\n{"a": 1},\n{"a": 2}\n{"a": 3}]', 4, "broken JSON: a comma or ] is missing"),
        (b'[{"a": 1},\n 7]', 2, "the row is not an object"),
        (b'[{"a": 1},\n{"a":\n x}]', 3, "broken JSON: Expecting value at column 2"),
        (b'[{"a": 1},\n]', 2, "broken JSON: Expecting value"),
        (b'[{"a": 1}', 1, "broken JSON: a comma or ] is missing"),
        (b'[{"a": 1}]\n{"a": 2}\n', 2, "broken JSON: something follows the array"),
        (gzip.compress(b'{"a": 1}\n' * 5, mtime=0)[:-8], 6, "cannot be read: "),
    ],
)
def test_broken_file(tmp_path, content, line, what):
    (tmp_path / "a.jsonl").write_bytes(content)
    message = fault(tmp_path / "a.jsonl")
    assert message.startswith(f"{tmp_path}/a.jsonl:{line}: ") and what in message


@pytest.mark.parametrize("content", [b"", b" \n\n", b"[]", b"[ \n ]", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert fault(tmp_path / "a.jsonl") == f"{tmp_path}/a.jsonl: empty, it has no rows; valid: at least one row"


def test_escaped_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}')
    assert read(tmp_path / "a.jsonl")[0] == [{"a": "\U0001f600"}]


def test_array_of_many_rows_is_read_in_linear_time(tmp_path):
    """20,000 elements on lines of their own: a scan from the beginning at each would take minutes."""
    (tmp_path / "a.json").write_text("[\n" + ",\n".join('{"a": 1}' for _ in range(20_000)) + "\n]")
    assert [row["line"] for row in json_rows(str(tmp_path / "a.json"), "a")] == list(range(2, 20_002))


# --- the cache ----------------------------------------------------------------------------------------------------


def test_second_reading_comes_from_the_cache_until_the_content_changes(tmp_path, monkeypatch):
    read_paths = []

    def counted(path, name):
        read_paths.append(name)
        yield from json_rows(path, name)

    monkeypatch.setattr(sources, "json_rows", counted)
    first = write_jsonl(tmp_path / "a.jsonl", ROWS)
    copy = write_jsonl(tmp_path / "b.jsonl", ROWS)
    assert read(first)[0] == read(first)[0] == read(copy)[0] == ROWS
    assert read_paths == [first], "equal content is read once, whatever its name"
    assert read(copy)[1][0] == f"{copy}:1", "but places have the name that was asked for"
    write_jsonl(tmp_path / "a.jsonl", ROWS[:4])
    assert read(first)[0] == ROWS[:4]
    assert read_paths == [first, first]


def test_another_format_does_not_meet_the_cache(tmp_path, monkeypatch):
    config = SourceConfig(path=write_jsonl(tmp_path / "a.jsonl", ROWS))
    before = open_source(config, "k").content
    assert open_source(config, "k").content == before
    monkeypatch.setattr(caching, "FORMAT", caching.FORMAT + 1)
    assert open_source(config, "k").content != before


def test_a_cache_depends_on_no_source_file():
    """A changed comment must not make every user's data be tokenized again."""
    text = f"{caching.FORMAT}\0{datasets.__version__}\0a\0b"
    assert caching.digest(["a", "b"]) == hashlib.sha256(text.encode()).hexdigest()[:32]


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_changed_parquet_with_the_same_time_of_change(tmp_path, kind):
    """`datasets` alone would take the old rows: it looks at the path and its time of change."""
    path, seen = tmp_path / kind / "a.parquet", []
    path.parent.mkdir()
    for rows in (ROWS, ROWS[::-1]):
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        os.utime(path, (1e9, 1e9))
        seen.append(read(path if kind == "parquet" else path.parent)[0])
    assert seen == [ROWS, ROWS[::-1]]


# --- parquet, saved folders, the hub --------------------------------------------------------------------------------


def test_other_kinds_give_the_same_rows_by_number(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=rows, test=rows.select([3, 4])).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", ROWS)
    for name in ("a.parquet", "saved", "dict", "files"):
        assert read(tmp_path / name) == (ROWS, [f"{tmp_path / name}:row {i}" for i in range(5)])
    assert read(SourceConfig(path=str(tmp_path / "dict"), split="test"))[0] == ROWS[3:]


def test_saved_folder_is_left_as_it_was(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    before = sorted(p.name for p in (tmp_path / "saved").iterdir())
    read(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == before


def test_hub(monkeypatch):
    """Not run against the hub: what it is asked for, and that its rows come back."""
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kw: asked.append((args, kw)) or datasets.Dataset.from_list(ROWS)
    )
    config = SourceConfig(path="org/name", name="small", split="train[:5]")
    assert read(config) == (ROWS, [f"org/name:row {i}" for i in range(5)])
    assert asked == [(("org/name", "small"), {"split": "train[:5]"})]


def test_hub_without_rows(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: datasets.Dataset.from_dict({"prompt": []}))
    assert fault("org/name") == "org/name: empty, it has no rows; valid: at least one row"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route\nto host"),
        ValueError('Unknown split "x"'),
        datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_hub_fails_in_one_line(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    first = str(error).splitlines()[0]
    advice = f"; valid: {PREPARE}" if isinstance(error, ConnectionError) else ""
    assert fault("org/name") == f"data.train[0].path: org/name: cannot be loaded: {first}{advice}"


def test_attempts_to_reach_the_hub_are_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client warns of each of its attempts, a dozen lines before the one line of the error."""
    client, logged = logging.getLogger("huggingface_hub.utils._http"), logging.handlers.BufferingHandler(10)
    monkeypatch.setattr(client, "handlers", [logged])
    with pytest.raises(UserError), caching.one_error("org/name", "data.train[0]"):
        client.warning("Retrying in 8s [Retry 5/5].")
        raise ConnectionError
    client.warning("as before")
    assert [record.getMessage() for record in logged.buffer] == ["as before"]


@pytest.mark.parametrize(
    "path",
    [
        "absent",
        "absent.jsonl",
        "data/absent.jsonl",
        "./org/name",
        "/org/name",
        "../a",
        "a/b/c",
        "~/a",
        "a/b.gz",
        "a/b.tsv",
    ],
)
def test_missing_file_is_not_looked_for_on_the_hub(monkeypatch, path):
    monkeypatch.setattr(datasets, "load_dataset", None)
    valid = "a file, a folder, a hub id org/name"
    assert fault(path) == f"data.train[0].path: no such file or folder: {path}; valid: {valid}"


def test_faults_of_other_kinds(tmp_path, capfd):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "dict"))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "none"))
    at = f"{tmp_path}"
    assert fault(f"{at}/a.parquet").startswith(f"data.train[0].path: {at}/a.parquet: cannot be loaded: ")
    assert fault(f"{at}/empty").startswith(f"data.train[0].path: {at}/empty: cannot be loaded: ")
    assert fault(f"{at}/dict") == f"data.train[0].split: {at}/dict has no split train; valid: test"
    split = SourceConfig(path=f"{at}/a.jsonl", split="test")
    assert fault(split) == f"data.train[0].split: {at}/a.jsonl is one file; valid: no split"
    split = SourceConfig(path=f"{at}/saved", split="test")
    assert fault(split) == f"data.train[0].split: {at}/saved holds one set without splits; valid: no split"
    assert fault(f"{at}/none") == f"{at}/none: empty, it has no rows; valid: at least one row"
    assert capfd.readouterr().err == "", "the error is all that a user reads"


def test_gzip_by_another_name(tmp_path):
    path = write_gzip(tmp_path / "a.json", b'{"a": 1}\n')
    assert read(path) == ([{"a": 1}], [f"{path}:1"])


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_cache_without_locks_is_one_line(tmp_path, monkeypatch, code) -> None:
    """An NFS without a lock daemon; `datasets` locks what it writes."""

    def no_locks(file, operation) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = fault(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    cache = datasets.config.HF_DATASETS_CACHE
    assert said.startswith(f"HF_HOME: {cache}: files cannot be locked there: {os.strerror(code)}; valid: a folder on")


def test_a_cache_that_cannot_be_made_is_not_told_as_the_data(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with cache_of_datasets(tmp_path / "file" / "cache"):
        said = fault(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    assert said == f"HF_HOME: cannot write to {tmp_path}/file/cache: Not a directory; valid: a folder to write in"


def test_a_full_cache_is_one_line(tmp_path, monkeypatch) -> None:
    """`datasets` wraps the error of a write, which has no file name."""

    def full(**_):
        yield from ()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sources, "json_rows", full)
    said = fault(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    what = f"the disk is full: cannot write {datasets.config.HF_DATASETS_CACHE}, about 0.4 KiB: "
    assert said.startswith(f"HF_HOME: {what}")
    assert said.endswith(" are free there; valid: a folder with more room, or free space there")


# --- rows in the cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv"])
def test_a_text_in_the_cache_is_the_same_without_datasets(tmp_path, monkeypatch, hf_cache, name) -> None:
    """Until its rows are asked for, as where they are tokenized."""
    path = tmp_path / name
    text = "prompt,chosen\na,b\nc,d\n" if name.endswith(".csv") else '{"prompt": "a", "x": ""}\n\n{"prompt": "b"}\n'
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    first = open_source(SourceConfig(str(path)), "k")
    monkeypatch.setattr(sources, "_write_text", None)
    again = open_source(SourceConfig(str(path)), "k")
    for name in ("num_rows", "columns", "content", "has_lines", "first_record"):
        assert getattr(again, name) == getattr(first, name)
    assert again.first_row() == first.first_row() and again.first_row()["prompt"] == "a"
    assert again.num_rows == len(again.rows) == 2 and again.rows.to_list() == first.rows.to_list()
    assert again.rows[0] == again.first_record


def test_rows_that_were_not_written_to_their_end_are_written_again(tmp_path, hf_cache) -> None:
    """SHA256SUMS is written last."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert len(opened(path).rows) == len(ROWS)
    (sums,) = (hf_cache / "datasets" / "dpo").rglob(SUMS)
    sums.unlink()
    assert arrow_files(hf_cache / "datasets" / "dpo") == []
    assert len(opened(path).rows) == len(ROWS) and sums.exists()
