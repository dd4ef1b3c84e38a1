"""A format that is registered in `FORMATS` is detected, read and counted like any other."""

import pytest

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.pairs.prepare import prepare_data
from dpo.sources.formats.example import Example
from dpo.sources.formats.examples import FORMATS, Format
from tests.support.data_fixtures import EOS, TinyModelConfig, all_pairs, ids, make_config, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()
ROWS = [
    {"ask": "p0", "answers": ["a", "bc"], "best": 1, "by": "x"},
    {"ask": "p1", "answers": ["d", "ef", "g"], "best": 0},
]


def best_of(row):
    """{ask, answers, best}: one answer is better than each other one."""
    others = [i for i in range(len(row["answers"])) if i != row["best"]]
    return Example(row["ask"], tuple(row["answers"]), tuple((row["best"], i) for i in others))


def of_ids(row):
    """{ids, good, bad}: token ids."""
    return Example(tuple(row["ids"]), (tuple(row["good"]), tuple(row["bad"])), ((0, 1),))


BEST_OF = Format("best_of", (frozenset({"ask", "answers", "best"}),), "{ask, answers, best}", best_of)
OF_IDS = Format("of_ids", (frozenset({"ids", "good", "bad"}),), "{ids, good, bad}", of_ids, holds_ids=True)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for format in (BEST_OF, OF_IDS):
        monkeypatch.setitem(FORMATS, format.name, format)


@pytest.mark.parametrize("name", ["best_of", "auto"])
def test_a_file_of_a_new_format(tmp_path, tokenizer_folder, name):
    """Row 0: answer 1 beats 0. Row 1: answer 0 beats 1 and 2. `by` is no column of the format."""
    source = SourceConfig(write_jsonl(tmp_path / "a.jsonl", ROWS), format=name)
    data = prepare_data(make_config(source, tokenizer=tokenizer_folder), MODEL)
    expected = [("p0", "bc", "a"), ("p1", "d", "ef"), ("p1", "d", "g")]
    assert all_pairs(data.train) == [(ids(p), [*ids(w), EOS], [*ids(lo), EOS]) for p, w, lo in expected]
    (report,) = data.report.sources
    assert (report.format, report.rows, report.pairs, report.ignored_columns) == ("best_of", 2, 3, ("by",))


@pytest.mark.parametrize("name", ["of_ids", "auto"])
def test_a_new_format_of_ids_needs_no_tokenizer(tmp_path, name):
    """Ids stay as they are, without EOS; the folder of the tokenizer is not there."""
    source = SourceConfig(write_jsonl(tmp_path / "a.jsonl", [{"ids": [7, 8], "good": [9], "bad": [3, 4]}]), format=name)
    data = prepare_data(make_config(source, tokenizer=str(tmp_path / "missing")), MODEL)
    assert all_pairs(data.train) == [([7, 8], [9], [3, 4])]


def test_what_a_new_format_lacks_is_told(tmp_path, tokenizer_folder):
    source = SourceConfig(write_jsonl(tmp_path / "a.jsonl", [{"ask": "p0", "best": 1}]), format="best_of")
    valid = r"valid: {ask, answers, best}$"
    with pytest.raises(UserError, match="the columns ask, best are not those of best_of; " + valid):
        prepare_data(make_config(source, tokenizer=tokenizer_folder), MODEL)
