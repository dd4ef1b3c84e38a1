"""The cache of tokenized rows and the processes that fill it."""

import hashlib
import os
import signal
import socket

import datasets
import huggingface_hub
import pytest

from dpo.base.errors import RunError
from dpo.config import SourceConfig
from dpo.pairs import prepare as data
from dpo.pairs import token_rows
from dpo.pairs.prepare import prepare_data
from dpo.sources import caching
from tests.support.data_fixtures import (
    ROWS,
    TinyModelConfig,
    all_pairs,
    make_config,
    make_tokenizer,
    plain_pairs,
    write_jsonl,
)

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()


@pytest.fixture
def tokenized_rows(monkeypatch):
    """The numbers of the rows that were tokenized since, as a list that grows."""
    rows = []
    tokenize_row = token_rows.tokenize_row

    def counted(record, index, **options):
        rows.append(index)
        return tokenize_row(record, index, **options)

    monkeypatch.setattr(token_rows, "tokenize_row", counted)
    return rows


def test_second_start_tokenizes_nothing(tmp_path, tokenizer_folder, tokenized_rows):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)

    def run(**changes):
        tokenized_rows.clear()
        fields = {"tokenizer": tokenizer_folder, "max_length": 8, "max_prompt_length": 4} | changes
        prepared = prepare_data(make_config(fields.pop("path", path), **fields), MODEL)
        return len(tokenized_rows), prepared.train.content_hash

    first = run()
    assert first[0] == 10
    assert run() == (0, first[1])
    for same in ({"seed": 5}, {"pairs_per_step": 2}, {"order": "sequential"}, {"on_bad_row": "stop"}, {"num_proc": 1}):
        assert run(**same) == (0, first[1])
    assert run(path=write_jsonl(tmp_path / "copy.jsonl", ROWS)) == (0, first[1]), "equal content under another name"
    assert run(max_length=9)[0] == run(max_prompt_length=3)[0] == 10
    write_jsonl(tmp_path / "a.jsonl", ROWS[1:])
    assert run()[0] == 9
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert run() == (0, first[1]), "the first content again"


def test_another_tokenizer_at_the_same_path_tokenizes_again(tmp_path, tokenizer_folder, tokenized_rows):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder)
    without = all_pairs(prepare_data(config, MODEL).train)
    make_tokenizer(bos=True).save_pretrained(tokenizer_folder)
    tokenized_rows.clear()
    assert all_pairs(prepare_data(config, MODEL).train) == [([1, *prompt], *rest) for prompt, *rest in without]
    assert len(tokenized_rows) == 10


def test_processes_give_what_one_gives(tmp_path, tokenizer_folder, hf_cache, capfd):
    """Also that they say nothing, and that a later start with another number of them takes what they left."""
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder, num_proc=3)
    train = prepare_data(config, MODEL).train
    assert all_pairs(train) == plain_pairs(ROWS)
    assert capfd.readouterr() == ("", "")
    cached = sorted((hf_cache / "datasets" / "dpo").glob("tokens-*/*"))
    assert len(cached) == 4 and sum(path.suffix == ".arrow" for path in cached) == 3  # and SHA256SUMS
    alone = make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder, num_proc=1)
    assert prepare_data(alone, MODEL).train.content_hash == train.content_hash
    assert sorted((hf_cache / "datasets" / "dpo").glob("tokens-*/*")) == cached


@pytest.mark.parametrize("num_proc", [1, 3])
def test_one_bar_counts_the_rows_of_all_processes(tmp_path, tokenizer_folder, monkeypatch, capfd, num_proc):
    monkeypatch.setattr(token_rows, "ROWS_PER_REPORT", 2)  # processes of 3, 3 and 4 rows
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder, num_proc=num_proc)
    datasets.utils.enable_progress_bars()
    monkeypatch.setattr(huggingface_hub.utils, "are_progress_bars_disabled", lambda: False)
    prepare_data(config, MODEL)
    shown = capfd.readouterr().err
    assert "tokenizing a.jsonl: 10/10 rows" in shown
    assert "Map" not in shown, "no bar of Dataset.map beside it"


def raise_memory_error():
    raise MemoryError


ENDS = {
    "was killed, as the kernel does when the host's memory runs out": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ended early, by SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "ended early, by exit code 7": lambda: os._exit(7),
    "found no more memory": raise_memory_error,
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_ends_early_is_named(tmp_path, tokenizer_folder, monkeypatch, hf_cache, how):
    """Nothing of what the others wrote is taken for the whole: the next start tokenizes all rows."""
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder, num_proc=3)
    tokenize_row = token_rows.tokenize_row

    def fail_in_row_5(record, index, **options):
        return ENDS[how]() if index == 5 else tokenize_row(record, index, **options)

    with monkeypatch.context() as patch:
        patch.setattr(token_rows, "tokenize_row", fail_in_row_5)
        with pytest.raises(RunError) as error:
            prepare_data(config, MODEL)
    who = f"data.num_proc: one of 3 processes that tokenize on {socket.gethostname()}"
    less = "what helps: data.num_proc below 3 (1: the rank itself tokenizes)"
    assert str(error.value) == f"{who} {how}; {less}"
    assert [path.name[:5] for path in (hf_cache / "datasets" / "dpo").iterdir()] == ["rows-"], "the raw rows alone"
    assert all_pairs(prepare_data(config, MODEL).train) == plain_pairs(ROWS)


@pytest.mark.parametrize("before", [None, "true"])
def test_tokenizers_use_no_threads_in_processes(tmp_path, tokenizer_folder, monkeypatch, before):
    """The variable that the library reads is set in the processes, and afterwards here what it was."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    tokenize_row = token_rows.tokenize_row

    def checked(*args, **options):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        return tokenize_row(*args, **options)

    monkeypatch.setattr(token_rows, "tokenize_row", checked)
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder, num_proc=3)
    assert all_pairs(prepare_data(config, MODEL).train) == plain_pairs(ROWS)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_number_of_processes(monkeypatch):
    monkeypatch.setattr(token_rows.os, "sched_getaffinity", lambda _: set(range(64)))
    assert token_rows.processes(None, 100) == 1, "a small set"
    assert token_rows.processes(None, 1_000_000) == 8
    assert token_rows.processes(3, 100) == 3
    assert token_rows.processes(3, 2) == 2
    assert token_rows.processes(1, 1_000_000) == 1


def test_rows_stay_on_disk(tmp_path, tokenizer_folder):
    prepared = prepare_data(make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder), MODEL)
    files = {file.name for file in prepared.train.token_files}
    assert files and all(str(tmp_path) in name and "tokens-" in name for name in files)


def test_what_is_cached_is_of_its_formats(tmp_path, tokenizer_folder):
    """Fails where what is cached has changed and users would go on with what an older version left them: raise
    `caching.FORMAT` (the rows) or `data.FORMAT` (the pairs), and write the new digests here.
    """
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    held_out = SourceConfig(path=path, holdout=0.5)
    prepared = prepare_data(make_config(held_out, tokenizer=tokenizer_folder, max_length=6, max_prompt_length=3), MODEL)
    rows = hashlib.sha256(repr(prepared.train.rows.to_pylist()).encode()).hexdigest()[:16]
    pairs = hashlib.sha256()
    for pair_set in (prepared.train, prepared.eval):
        for name in ("row_of_pair", "pair_in_row", "prompt_of_pair", "sizes", "keys"):  # places are of Arrow's layout
            pairs.update(bytes(getattr(pair_set, name)[:]))
    assert (caching.FORMAT, rows) == (4, "93c8919af60962c7")
    assert (data.FORMAT, pairs.hexdigest()[:16]) == (4, "18a610913f58bcba")
