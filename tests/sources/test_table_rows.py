"""CSV and TSV files: the rows by Python's csv module, with the line where each begins, and every fault in one line."""

import csv
import gzip
import io
import json

import pandas as pd
import pytest

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.pairs.prepare import prepare_data
from dpo.sources.formats.table_rows import table_rows
from dpo.sources.source import decode_row, open_source
from tests.support.data_fixtures import EOS, TinyModelConfig, all_pairs, ids, make_config

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
HEADER = ["prompt", "chosen", "rejected", "note"]
FIELDS = [
    ["a, b", 'say "yes"', "two\nlines", ""],
    ["pé", "\U0001f600", "a\ttab", "x"],
    ["three\n\nlines\n", "[1, 2]", " kept ", "1"],
    ["plain", "a", "b", ""],
]
ROWS = [{name: value or None for name, value in zip(HEADER, values, strict=True)} for values in FIELDS]
LINES = [2, 4, 5, 9]
"""The header is line 1; the first row has one line end inside, the third has three."""


def table(delimiter: str, fields=FIELDS, line_end: str = "\n") -> bytes:
    """A table as Python's csv module writes it."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=line_end).writerows([HEADER, *fields])
    return text.getvalue().encode()


def read(path):
    source = open_source(SourceConfig(path=str(path)), "data.train[0]")
    decoded = [decode_row(record, i, source.has_lines) for i, record in enumerate(source.rows)]
    return [row for row, _ in decoded], [source.place(where) for _, where in decoded]


def fault(path) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "pack", [bytes, lambda text: gzip.compress(text, mtime=0), lambda text: b"\xef\xbb\xbf" + text]
)
@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ","), ("A.TSV.GZ", "\t")]
)
def test_a_table_gives_what_was_written(tmp_path, name, delimiter, pack):
    """Plain, gzipped, or with a byte order mark; gzip is told by the content, whatever the name says."""
    (tmp_path / name).write_bytes(pack(table(delimiter)))
    assert read(tmp_path / name) == (ROWS, [f"{tmp_path / name}:{line}" for line in LINES])


def test_line_ends_of_windows_and_blank_lines(tmp_path):
    """Blank lines are before the header (2), and between the rows (1); what is inside quotes is kept as it is."""
    (tmp_path / "a.csv").write_bytes(b'\r\n\r\nprompt,n\r\n"a\r\nb",1\r\n\r\nc,2')
    places = [f"{tmp_path}/a.csv:{line}" for line in (4, 7)]
    assert read(tmp_path / "a.csv") == ([{"prompt": "a\r\nb", "n": "1"}, {"prompt": "c", "n": "2"}], places)


@pytest.fixture
def limit():
    """A limit of Python's csv module that is not its own, 131,072 characters, and the former one after the test."""
    former = csv.field_size_limit(1000)
    yield 1000
    csv.field_size_limit(former)


def test_a_long_field_leaves_the_limit_of_others_as_it_is(tmp_path, limit):
    """Python's csv module refuses longer fields, unless told otherwise for the process."""
    long = "x" * 300_000
    (tmp_path / "a.csv").write_bytes(table(",", [["p", long, "r", "n"]]))
    assert read(tmp_path / "a.csv")[0][0]["chosen"] == long
    assert csv.field_size_limit() == limit
    (tmp_path / "b.csv").write_text(f'a,b\n1,2\n3,"{long}')
    assert fault(tmp_path / "b.csv").startswith(f"{tmp_path}/b.csv:3: ")
    assert csv.field_size_limit() == limit


def test_row_numbers_of_pandas(tmp_path):
    """`DataFrame.to_csv` writes the numbers of the rows as a first column without a name."""
    pd.DataFrame([{"prompt": "a"}, {"prompt": "c"}]).to_csv(tmp_path / "a.csv")
    rows = [json.loads(row["row"]) for row in table_rows(str(tmp_path / "a.csv"), "a", ",")]
    assert rows == [{"Unnamed: 0": "0", "prompt": "a"}, {"Unnamed: 0": "1", "prompt": "c"}]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b"a,b\n1,2\n3\n", 3, "1 fields in a table of 2 columns; valid: one field per column, in quotes where it has"),
        (b'a,b\n"1\n1",2\n3,4,5\n', 4, "3 fields in a table of 2 columns"),
        (b"a,b,a\n1,2,3\n", 1, "the column 'a' is a duplicate; valid: different names of columns"),
        (
            b"prompt;chosen;rejected\n1;2;3\n",
            1,
            "one column, whose name has semicolons or tabs: 'prompt;chosen;rejected'",
        ),
        (
            b"\n\nprompt\tchosen\n1\t2\n",
            3,
            "valid: commas between the columns; tabs where the file's name ends in .tsv",
        ),
        (b"\na,,b\n1,2,3\n", 2, "column 2 has no name; valid: a first row of names"),
        (b"a,b\n1,2\n3,\x004\n", 3, "a NUL byte"),
        (b"a,b\n1,2\n3,\xff\n", 3, "not UTF-8 (invalid start byte)"),
        (b'a,b\n1,2\n"3"3,4\n', 3, "broken table: ',' expected after '\"'; valid: quotes as in RFC 4180"),
        (b'a,b\n1,2\n"3,4\n5,6\n', 3, "broken table: unexpected end of data"),
        (gzip.compress(b"a,b\n1,2\n" * 5, mtime=0)[:-8], 11, "cannot be read: "),
    ],
)
def test_a_broken_table(tmp_path, content, line, what):
    """The place is the line in which the row begins."""
    (tmp_path / "a.csv").write_bytes(content)
    message = fault(tmp_path / "a.csv")
    assert message.startswith(f"{tmp_path}/a.csv:{line}: ") and what in message


@pytest.mark.parametrize("content", [b"", b"\n\n", b"a,b\n", b"a,b\n\n\n"])
def test_a_table_without_rows(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    assert fault(tmp_path / "a.csv").startswith(f"{tmp_path}/a.csv: empty, it has no rows; valid: at least one row")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz"])
@pytest.mark.parametrize("content", [b'{"a": "1,2"}\n', b'[{"a": "1,2"}]'])
def test_json_is_told_by_its_first_character(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ([{"a": "1,2"}], [f"{tmp_path / name}:1"])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a", "csv", "a.csv.zst"])
def test_a_file_of_another_kind_names_the_suffixes(tmp_path, name):
    (tmp_path / name).write_bytes(b"\nprompt,chosen,rejected\na,b,c\n")
    valid = "JSON or JSONL, *.csv, *.tsv (all of them also gzipped), Parquet"
    assert (
        fault(tmp_path / name) == f"{tmp_path / name}:2: not JSON, which begins with {{ or [, but 'p'; valid: {valid}"
    )


def test_equal_bytes_of_two_suffixes_are_two_contents(tmp_path):
    """The cache of rows is named by content, which the delimiter is a part of."""
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_bytes(b"a\tb,c\n1\t2,3\n")
    assert read(tmp_path / "a.csv")[0] == [{"a\tb": "1\t2", "c": "3"}]
    assert read(tmp_path / "a.tsv")[0] == [{"a": "1", "b,c": "2,3"}]


def test_rows_are_read_one_by_one(tmp_path):
    """The first row comes before the fault of a later one is met: a large file is never in memory as a whole."""
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,\n" + b"2,x\n" * 1000 + b"3\n")
    rows = table_rows(str(tmp_path / "a.csv"), "a.csv", ",")
    assert next(rows) == {"row": json.dumps({"a": "1", "b": None}), "line": 2, "columns": '["a"]'}
    with pytest.raises(UserError, match=r"^a\.csv:1003: "):
        list(rows)


# --- tables of known shapes, as pairs by hand -------------------------------------------------------------------------


def write_table(path, rows):
    """A table of rows that all have the same columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def chat(prompt, *answers):
    """The ids of a prompt and of its answers through the template of the tests, [role]content</s>, by hand."""
    begin = [*ids(f"[user]{prompt}"), EOS, *ids("[assistant]")]
    return (begin, *([*ids(answer), EOS] for answer in answers))


def texts(prompt, *answers):
    """The ids of a prompt and of its answers that are texts, by hand."""
    return (ids(prompt), *([*ids(answer), EOS] for answer in answers))


VOTE = {"prompt": '["a\\nb"]', "response_a": '["c, d"]', "response_b": '["\\"e\\""]', "winner_tie": 0}


@pytest.mark.parametrize(
    ("name", "rows", "pairs", "dropped"),
    [
        (
            "texts.csv",
            [{"prompt": "a,\nb", "chosen": ' "c"', "rejected": " d"}, {"prompt": "e", "chosen": "f", "rejected": "-"}],
            [texts("a,\nb", ' "c"', " d"), texts("e", "f", "-")],
            {},
        ),
        (
            "shp.tsv",
            [{"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": label} for label in (0, 1)],
            [texts("\n\nHuman: q\n\nAssistant:", *answers) for answers in ((" b", " a"), (" a", " b"))],
            {},
        ),
        (
            "winner.csv",
            [{"prompt": "p", "answer_a": "a", "answer_b": "b", "winner": winner} for winner in ("tie", "B", 0)],
            [texts("p", "b", "a"), texts("p", "a", "b")],
            {"tie": 1},
        ),
        (
            "votes.csv",
            [VOTE | {"winner_model_a": a, "winner_model_b": 1 - a} for a in (1, 0)],
            [chat("a\nb", "c, d", '"e"'), chat("a\nb", '"e"', "c, d")],
            {},
        ),
    ],
)
def test_pairs_of_a_table(tmp_path, tokenizer_folder, name, rows, pairs, dropped):
    """A text with a comma, a line end and quotes; numbers, which a table has as texts; lists of turns as JSON texts."""
    data = prepare_data(make_config(write_table(tmp_path / name, rows), tokenizer=tokenizer_folder), TinyModelConfig())
    assert all_pairs(data.train) == pairs
    (source,) = data.report.sources
    assert source.dropped == dropped


def test_an_empty_field_that_is_needed_is_missing(tmp_path, tokenizer_folder):
    """In a column with values in other rows; the place is the row's."""
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\n"p\nq",a,b\np,a,\n')
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/a\.csv:4: missing or null field rejected; the row has: prompt, "
    ):
        prepare_data(make_config(str(tmp_path / "a.csv"), tokenizer=tokenizer_folder), TinyModelConfig())
