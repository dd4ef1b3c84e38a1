"""Cached rows, token rows and pairs that are not as they were written: found once a node, said, and made again."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dpo.base.sums import SUMS, find_fault
from dpo.config import SourceConfig
from dpo.pairs.prepare import PreferenceData, prepare_data
from dpo.sources import kept
from dpo.sources.kept import trust
from tests.support.data_fixtures import ROWS, TinyModelConfig, all_pairs, make_config, make_tokenizer, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()
PAIR_FILES = ("report.json", *(f"{part}/{name}.npy" for part in ("train", "eval") for name in (
    "row_of_pair", "pair_in_row", "prompt_of_pair", "sizes", "places", "keys", "weights", "margins"
)))  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: str):
    """Ten rows with weights and margins, a prompt of which is held out."""
    rows = [row | {"w": 0.5 + i, "gap": float(i)} for i, row in enumerate(ROWS)]
    columns = {"weight": "w", "margin": "gap"}
    source = SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows), holdout=1, columns=columns)
    return make_config(source, tokenizer=tokenizer_folder)


def columns_of(prepared: PreferenceData) -> list[object]:
    """All that a run reads of its data."""
    sets = [prepared.train, prepared.eval]
    names = ("row_of_pair", "pair_in_row", "prompt_of_pair", "sizes", "places", "keys", "weights", "margins")
    return [prepared.report, *([np.asarray(getattr(one, name)).tolist() for name in names] for one in sets),
            *(all_pairs(one) for one in sets)]  # fmt: skip


def flip(path: Path, where: float) -> None:
    """Flips a bit in the middle of the byte at this part of the file."""
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 16
    path.write_bytes(content)


def damage(path: Path, how: str) -> None:
    """One of the things that happen to files."""
    match how:
        case "first byte" | "middle" | "last byte":
            flip(path, {"first byte": 0, "middle": 0.5, "last byte": 1}[how])
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()


def file_of(cache: Path, name: str) -> Path:
    """A file of the cache by the beginning of its folder's name and its own name or suffix."""
    kind, _, end = name.partition("/")
    return min(cache.glob(f"datasets/dpo/{kind}-*/{end}"))


@pytest.mark.parametrize("how", ["first byte", "middle", "last byte", "cut", "empty", "gone"])
def test_every_damaged_file_is_made_again(config, hf_cache, capsys, how):
    """The file is named in one line, all that a run reads is as before, and the next start finds nothing."""
    expected = columns_of(prepare_data(config, MODEL))
    names = [f"pairs/*/{name}" for name in PAIR_FILES]
    names += ["tokens/*00000.arrow", "rows/**/*.arrow", "rows/**/dataset_info.json"]
    for name in names:
        path = file_of(hf_cache, name)
        damage(path, how)
        assert columns_of(prepare_data(config, MODEL)) == expected, name
        (line,) = capsys.readouterr().err.splitlines()
        folder = next(parent for parent in path.parents if str(parent) in line)
        fault = "is missing" if how == "gone" else "has changed"
        what = f"{path.relative_to(folder)} {fault}"
        assert line.endswith(f"cache: {folder} is damaged and made again: {what}"), name
    prepare_data(config, MODEL)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["pairs", "tokens", "rows"])
@pytest.mark.parametrize("how", ["first byte", "last byte", "cut", "empty", "gone", "last line"])
def test_damaged_sums(config, hf_cache, capsys, kind, how):
    """A last line that is cut off leaves no file unchecked."""
    expected = columns_of(prepare_data(config, MODEL))
    path = file_of(hf_cache, f"{kind}/**/{SUMS}")
    if how == "last line":
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    else:
        damage(path, how)
    assert columns_of(prepare_data(config, MODEL)) == expected
    told = capsys.readouterr().err
    if (kind, how) != ("rows", "gone") and how != "cut":  # `datasets` may be killed before its rows have sums
        assert "is damaged and made again" in told
    assert path.exists() or how != "gone"


def test_every_file_of_token_rows_is_listed(config, hf_cache, capsys):
    """Two processes write two files. A second file that SHA256SUMS has lost is neither trusted nor left out."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_proc=2))
    expected = columns_of(prepare_data(config, MODEL))
    path = file_of(hf_cache, f"tokens/{SUMS}")
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    path.write_text(lines[0])
    assert columns_of(prepare_data(config, MODEL)) == expected
    assert re.search(r"made again: [0-9a-f]{32}-00001.arrow is not in SHA256SUMS", capsys.readouterr().err)


def test_another_folders_files_are_not_taken(config, hf_cache, tmp_path, capsys):
    """`prompt_of_pair` makes the order of a run, and is in no other hash: that of a set of fewer pairs is found."""
    expected = columns_of(prepare_data(config, MODEL))
    train, evaluation = (file_of(hf_cache, f"pairs/*/{part}/prompt_of_pair.npy") for part in ("train", "eval"))
    content = train.read_bytes()
    train.write_bytes(evaluation.read_bytes())
    evaluation.write_bytes(content)
    assert columns_of(prepare_data(config, MODEL)) == expected
    assert "eval/prompt_of_pair.npy has changed" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tokens", "pairs"])
def test_the_whole_folder_of_another_data_set_is_not_taken(config, hf_cache, tmp_path, capsys, kind):
    """Each of its files is as it was written, but of another data set: two folders have changed places."""
    expected = columns_of(prepare_data(config, MODEL))
    first = file_of(hf_cache, f"{kind}/{SUMS}").parent
    path = write_jsonl(tmp_path / "b.jsonl", [row | {"w": 2.0, "gap": 0.0} for row in ROWS[::-1]])
    source = dataclasses.replace(config.data.train[0], path=path)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, train=[source]))
    assert columns_of(prepare_data(other, MODEL)) != expected
    (second,) = {file.parent for file in hf_cache.glob(f"datasets/dpo/{kind}-*/{SUMS}")} - {first}
    first.rename(tmp_path / "spare"), second.rename(first), (tmp_path / "spare").rename(second)
    capsys.readouterr()
    assert columns_of(prepare_data(config, MODEL)) == expected
    assert re.search(f"cache: {first} is damaged and made again: [^ ]+ is of another folder", capsys.readouterr().err)


def test_one_rank_of_a_node_checks(config, monkeypatch):
    """The others read no file to check it; `trust` finds nothing."""
    expected = columns_of(prepare_data(config, MODEL))
    hashed = []
    monkeypatch.setattr(kept, "sha256_of", lambda path: hashed.append(path))
    assert columns_of(prepare_data(config, MODEL, trust)) == expected
    assert hashed == []


def test_the_other_ranks_of_a_node_remove_nothing(config, hf_cache, capsys):
    """Though a file is not listed: the first rank reads the folder, and has told what it found."""
    prepare_data(config, MODEL)
    path = file_of(hf_cache, f"pairs/{SUMS}")
    content = path.read_text().splitlines(keepends=True)[0]
    path.write_text(content)
    prepare_data(config, MODEL, trust)
    assert path.read_text() == content and capsys.readouterr().err == ""


def test_every_folder_is_checked_once(config, monkeypatch):
    prepare_data(config, MODEL)
    checked = []
    prepare_data(config, MODEL, lambda folder: checked.append(folder) or find_fault(folder))
    assert [re.split(r"-[0-9a-f]{32}", str(path))[0].rpartition("/")[2] for path in checked] == [
        "rows",
        "tokens",
        "pairs",
    ]


def test_seconds_are_told_where_they_are_many(config, monkeypatch, capsys):
    prepare_data(config, MODEL)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(kept, "LONG_SECONDS", -1.0)
    prepare_data(config, MODEL)
    assert len(re.findall(r"cache: \S+: SHA-256 of \S+ \S+ checked in 0\.\d s", capsys.readouterr().err)) == 3


def test_a_folder_that_is_removed_is_no_longer_there_under_its_name(config, hf_cache, monkeypatch):
    """Files that cannot be removed, as on NFS, do not keep the folder."""
    expected = columns_of(prepare_data(config, MODEL))
    flip(file_of(hf_cache, "tokens/*00000.arrow"), 0.5)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    assert columns_of(prepare_data(config, MODEL)) == expected


def test_another_tokenizer_is_another_folder(config, hf_cache, tokenizer_folder):
    prepare_data(config, MODEL)
    make_tokenizer(bos=True).save_pretrained(tokenizer_folder)
    prepare_data(config, MODEL)
    assert len(list(hf_cache.glob("datasets/dpo/tokens-*"))) == 2
    assert all(find_fault(folder) is None for folder in hf_cache.glob("datasets/dpo/tokens-*"))
