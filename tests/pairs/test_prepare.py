"""From files to pairs: the pairs themselves against a plain reading, and what is counted."""

import dataclasses
import gc
import gzip
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from dpo.config import SourceConfig
from dpo.pairs import prepare as data
from dpo.pairs.prepare import prepare_data
from dpo.pairs.tokens import completion_key
from tests.support.data_fixtures import (
    FIXTURES,
    ROWS,
    TinyModelConfig,
    all_pairs,
    ids,
    make_config,
    plain_pairs,
    write_gzip,
    write_jsonl,
)

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()


# --- pairs --------------------------------------------------------------------------------------------------------


def test_pairs_of_two_sources_in_order(tmp_path, tokenizer_folder):
    """All pairs of both files one after the other, and any of them by number, also twice."""
    paths = [write_jsonl(tmp_path / "a.jsonl", ROWS[:6]), write_jsonl(tmp_path / "b.jsonl", ROWS[6:])]
    train = prepare_data(make_config(*paths, tokenizer=tokenizer_folder), MODEL).train
    expected = plain_pairs(ROWS)
    assert len(train) == len(expected) == 16  # ten rows, of which 1, 2, 4, 5, 7, 8 have two pairs
    assert all_pairs(train) == expected
    assert all_pairs(train, [7, 3, 3, 15, 0]) == [expected[i] for i in (7, 3, 3, 15, 0)]
    assert all(ids.dtype == np.int32 for ids in dataclasses.astuple(train.pairs(np.array([0]))[0])[:3])
    assert train.pairs(np.array([], int)) == []


def test_prompt_numbers_by_first_appearance(tmp_path, tokenizer_folder):
    """Prompts p0 p1 p2 p3 p0 …: pairs a row 1 2 2 1 2 2 1 2 2 1, so the numbers begin 0 1 1 2 2 3 0 0."""
    train = prepare_data(make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder), MODEL).train
    assert np.asarray(train.prompt_of_pair).tolist() == [0, 1, 1, 2, 2, 3, 0, 0, 1, 1, 2, 3, 3, 0, 0, 1]


def test_keys_are_those_of_winner_and_loser(tmp_path, tokenizer_folder):
    train = prepare_data(make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder), MODEL).train
    expected = [[completion_key(np.array(p), np.array(c)) for c in both] for p, *both in plain_pairs(ROWS)]
    assert [[key.ljust(16, b"\0") for key in both] for both in np.asarray(train.keys).tolist()] == expected


def test_many_record_batches_and_processes(tmp_path):
    """2,500 rows in two files of two record batches each; row i is told by its ids: none is lost or doubled."""
    rows = [
        {"prompt_ids": [3 + i // 40] * (1 + i % 3), "chosen_ids": [5, i % 90], "rejected_ids": [6]} for i in range(2500)
    ]
    train = prepare_data(make_config(write_jsonl(tmp_path / "a.jsonl", rows), num_proc=2), MODEL).train
    assert len(train.token_files) == 2
    assert [list(pair) for pair in all_pairs(train)] == [list(row.values()) for row in rows]
    assert np.asarray(train.row_of_pair).tolist() == list(range(2500))
    assert train.lengths().tolist() == [[len(ids) for ids in row.values()] for row in rows]


def test_a_second_start_reads_no_row(tmp_path, tokenizer_folder, monkeypatch):
    """Pairs, numbers and report come from the cache, under the name that the file has now; another hold-out or seed is
    another set. A cache that was copied, with other times, is the same.
    """
    path = write_jsonl(
        tmp_path / "a.jsonl", [*ROWS, ROWS[0] | {"pairs": []}, ROWS[1] | {"completions": ["", "b", "c"]}]
    )
    copy = write_jsonl(tmp_path / "b.jsonl", [json.loads(line) for line in Path(path).read_text().splitlines()])

    def prepared(path, seed=0, holdout=2):
        source = SourceConfig(path=path, holdout=holdout)
        return prepare_data(make_config(source, tokenizer=tokenizer_folder, seed=seed), MODEL)

    first = prepared(path)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_number", None)
        again, copied = prepared(path), prepared(copy)
    assert again.report == first.report
    assert [source.path for source in copied.report.sources] == [copy]
    assert dataclasses.replace(copied.report.sources[0], path=path) == first.report.sources[0]
    for one, other in ((first.train, again.train), (first.eval, again.eval)):
        assert all_pairs(one) == all_pairs(other) and one.content_hash == other.content_hash
    numbered, number = [], data._number
    monkeypatch.setattr(data, "_number", lambda *args: (numbered.append(1), number(*args))[1])
    prepared(path, seed=1)
    prepared(path, holdout=1)
    for file in first.train.token_files:
        os.utime(file.name, (1e9, 1e9))
    prepared(path)
    assert len(numbered) == 2


def test_no_file_of_the_data_stays_mapped(tmp_path, tokenizer_folder, hf_cache):
    """What is mapped counts as the process's memory once it is looked at: neither the first start nor a second one, nor
    reading pairs, leaves a map of source rows, token rows or pair files.
    """
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    for _ in range(2):
        prepared = prepare_data(make_config(path, tokenizer=tokenizer_folder), MODEL)
        assert all_pairs(prepared.train) == plain_pairs(ROWS)
        gc.collect()
        assert list(hf_cache.rglob("*.arrow")) and list(hf_cache.rglob("*.npy"))
        assert str(hf_cache) not in Path("/proc/self/maps").read_text()


def test_a_set_outlives_its_files(tmp_path, tokenizer_folder, hf_cache):
    """Somebody clears the cache of `datasets` while a run goes on."""
    train = prepare_data(make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder), MODEL).train
    shutil.rmtree(hf_cache)
    assert all_pairs(train) == plain_pairs(ROWS)


def test_some_of_a_set(tmp_path, tokenizer_folder):
    """Those whose mask is true, known by their own content: the set of their rows alone has the same."""
    train = prepare_data(make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder), MODEL).train
    first = np.asarray(train.row_of_pair) < 4
    alone = prepare_data(
        make_config(write_jsonl(tmp_path / "b.jsonl", ROWS[:4]), tokenizer=tokenizer_folder), MODEL
    ).train
    assert all_pairs(train.select(first)) == plain_pairs(ROWS[:4]) == all_pairs(alone)
    assert train.select(first).content_hash == alone.content_hash != train.content_hash


def test_content_hash_is_of_the_pairs_in_order(tmp_path, tokenizer_folder):
    def content(rows):
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        return prepare_data(make_config(path, tokenizer=tokenizer_folder), MODEL).train.content_hash

    same = content(ROWS)
    assert same == content(ROWS)
    assert same == content([row | {"note": 1} for row in ROWS]), "columns that no format reads"
    assert same == content([row | {"completions": [*row["completions"], "unused"]} for row in ROWS])
    assert same != content(ROWS[::-1])
    assert same != content([ROWS[0] | {"pairs": [[2, 1]]}, *ROWS[1:]]), "winner and loser the other way round"
    assert same != content([*ROWS[:9], ROWS[9] | {"prompt": "p?"}])


def test_every_kind_of_source_gives_the_same_pairs(tmp_path, tokenizer_folder, monkeypatch):
    lines = write_jsonl(tmp_path / "a.jsonl", ROWS)
    rows = datasets.Dataset.from_list(ROWS)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    write_gzip(tmp_path / "a.jsonl.gz", (tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "files").mkdir()
    rows.to_parquet(str(tmp_path / "files" / "train.parquet"))
    paths = [lines, *(str(tmp_path / name) for name in ("a.parquet", "saved", "a.json", "a.jsonl.gz", "files"))]
    sets = [prepare_data(make_config(path, tokenizer=tokenizer_folder), MODEL).train for path in paths]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    sets.append(prepare_data(make_config("org/name", tokenizer=tokenizer_folder), MODEL).train)
    assert {pair_set.content_hash for pair_set in sets} == {sets[0].content_hash}
    assert all(all_pairs(pair_set) == plain_pairs(ROWS) for pair_set in sets)


@pytest.mark.parametrize("name", ["shp", "tldr"])
def test_fixtures_of_shp_and_tldr(name, tokenizer_folder):
    prepared = prepare_data(make_config(str(FIXTURES / f"{name}.jsonl"), tokenizer=tokenizer_folder), MODEL)
    assert len(prepared.train) == 3 and prepared.report.sources[0].format == name
    answer = {"shp": " Yes, if you start early and walk.", "tldr": " My friend is always late, what can I do?"}[name]
    assert prepared.train.pairs(np.array([1]))[0].chosen_ids.tolist() == [*ids(answer), 2]


def test_tokens_need_no_tokenizer(tmp_path, monkeypatch):
    """A saved set of int64 columns of the same names as ours, and a JSONL file."""
    monkeypatch.setattr(data, "load_tokenizer", None)
    rows = [{"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    paths = [write_jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "saved")]
    train = prepare_data(make_config(*paths, tokenizer="absent"), MODEL).train
    assert all_pairs(train) == [([1, 5], [6, 2], [7])] * 2


# --- counts -------------------------------------------------------------------------------------------------------


def test_report(tmp_path, tokenizer_folder):
    """By hand, prompt of 4 tokens cut to 3, room 2 for each completion:
    line 1: cut ("abc" to "ab"), kept. line 2: empty, and kept. line 3: [0, 1] is identical after truncation.
    lines 4 to 7: identical. line 8: repeated and contradicting. line 9: scores, one tie. line 10: no pair."""
    rows = [
        {"prompt": "long", "completions": ["abc", "d"], "pairs": [[0, 1]], "who": "me"},
        {"prompt": "q", "completions": ["", "d", "e"], "pairs": [[0, 1], [2, 1]], "id": 1},
        {"prompt": "long", "completions": ["xyz", "xyw"], "pairs": [[0, 1]]},
        *[{"prompt": "q", "completions": ["d", "d"], "pairs": [[0, 1]]}] * 4,
        {"prompt": "q", "completions": ["d", "e"], "pairs": [[0, 1], [0, 1], [1, 0]]},
        {"prompt": "q", "completions": ["d", "e", "f"], "scores": [1, 1, 2]},
        {"prompt": "q", "completions": ["d", "e"], "pairs": []},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = make_config(path, tokenizer=tokenizer_folder, max_length=5, max_prompt_length=3)
    report = prepare_data(config, MODEL).report
    source = report.sources[0]
    assert (source.rows, source.pairs, source.rows_without_pair) == (10, 7, 1)
    assert source.dropped == {"empty": 1, "identical_after_truncation": 1, "identical": 4, "tie": 1}
    assert source.places == {
        "empty": (":2",),
        "identical_after_truncation": (":3",),
        "identical": (":4", ":5", ":6"),
        "tie": (":9",),
    }
    assert (source.prompt_truncated, source.completions_truncated) == (1, 1)
    assert (source.repeated_pairs, source.contradicting_pairs) == (1, 3)
    assert source.ignored_columns == ("id", "who")
    assert report.lines() == [
        f"data.train[0] {path} (grouped): 10 rows, 7 pairs kept, 7 dropped",
        "  format grouped, by its columns completions, pairs, prompt: texts",
        "  dropped, empty: 1 (at :2)",
        "  dropped, identical_after_truncation: 1 (at :3)",
        "  dropped, identical: 4 (at :4, :5, :6, …)",
        "  dropped, tie: 1 (at :9)",
        "  1 rows without a pair",
        "  1 pairs that repeat an earlier pair of their row",
        "  3 pairs whose opposite is listed too",
        "  1 prompts cut at their beginning",
        "  1 completions cut at their end",
        "  WARNING: 4 rows of texts do not go through the tokenizer's chat template; data.train[0].as_chat: true reads"
        " them as conversations",
        "  columns not used: id, who",
        "7 pairs to train on, 0 to evaluate",
    ]


def test_report_warns_of_positions_and_of_prompts_on_both_sides(tmp_path, tokenizer_folder):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "Zxy", "rejected": "Zx"}])
    config = make_config(path, tokenizer=tokenizer_folder, eval=[SourceConfig(path=path)])
    report = prepare_data(config, TinyModelConfig(max_position_embeddings=4)).report
    assert [source.key for source in report.sources] == ["data.train[0]", "data.eval[0]"]
    assert (report.sources[0].over_positions, report.eval_prompts_in_training) == (1, 1)
    text = "\n".join(report.lines())
    advice = "(max_position_embeddings); data.max_length 4 cuts them"
    assert f"\n  WARNING: 1 completions end after the model's 4 positions {advice}\n" in text
    assert "2 completions tokenized apart from their prompt: as one text, both share a token" in text
    assert "WARNING: 1 prompts of data.eval are in training data too" in text


def test_real_hh(shared_data):
    """The metrics of the contract: 1,800 rows, 2 `prompts_differ`, 4 `empty`, 1,794 kept."""
    path = str(shared_data / "hh" / "public-0000-1799.jsonl.gz")
    config = make_config(path, tokenizer=str(shared_data / "stories260K"))
    prepared = prepare_data(config, TinyModelConfig(vocab_size=512))
    source = prepared.report.sources[0]
    assert (source.rows, source.pairs, source.dropped) == (1800, 1794, {"empty": 4, "prompts_differ": 2})
    differ, empty = [], []
    with gzip.open(path, "rt") as file:
        for line, row in enumerate(map(json.loads, file), start=1):
            (one, a), (two, b) = ([*row[k].rsplit("\n\nAssistant:", 1)] for k in ("chosen", "rejected"))
            differ += [f":{line}"] * (one != two)
            empty += [f":{line}"] * (one == two and not (a.strip() and b.strip()))
    assert source.places == {"prompts_differ": tuple(differ), "empty": tuple(empty[:3])}


def test_real_rankings(shared_data):
    """PandaLM: 122 rows list 677 pairs, none of them with equal texts; pairs that stand again are kept."""
    path = shared_data / "pandalm" / "grouped.jsonl"
    prepared = prepare_data(
        make_config(str(path), tokenizer=str(shared_data / "stories260K")), TinyModelConfig(vocab_size=512)
    )
    listed = [tuple(map(tuple, json.loads(line)["pairs"])) for line in path.read_text().splitlines()]
    again = sum(len(pairs) - len(set(pairs)) for pairs in listed)
    source = prepared.report.sources[0]
    assert (source.rows, source.pairs, source.dropped, len(prepared.train)) == (122, 677, {}, 677)
    assert source.repeated_pairs == again > 0
