"""The files of the reference cache: blocks that are whole or not there, found by content, shared by many writers."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.base.files import default_cache_dir, write_atomically
from dpo.pairs.tokens import completion_key
from dpo.ref_logps.blocks import ROW, RefRows, make_rows, read_rows, reference_key, split_keys, write_rows
from tests.support.ranks import Ranks

FACTS = {"model": "0" * 64, "dtype": "float32", "compute_dtype": "torch.float32", "device": "cpu", "attention": "a"}


def random_rows(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys (number, 2) and log-probabilities (number,)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**64, (number, 2), dtype=np.uint64), -100 * rng.random(number)


def as_dict(rows: RefRows) -> dict[tuple[int, int], float]:
    return {(int(h), int(lo)): float(v) for h, lo, v in zip(rows.high, rows.low, rows.logps, strict=True)}


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_is_in_the_name_of_the_folder(fact: str) -> None:
    assert reference_key(FACTS) == reference_key(dict(reversed(FACTS.items())))
    assert reference_key(FACTS | {fact: "another"}) != reference_key(FACTS)


def test_a_key_knows_where_the_prompt_ends() -> None:
    """1 2 | 3 and 1 | 2 3 are the same tokens and another question; an empty prompt is none of both."""
    ids = np.array([1, 2, 3], np.int32)
    keys = {completion_key(ids[:cut], ids[cut:]) for cut in range(4)}
    assert len(keys) == 4
    assert all(len(key) == 16 for key in keys)


def test_a_key_is_of_the_numbers_not_of_their_dtype_or_place() -> None:
    """The same ids as int64, or as every second item of another array, are the same completion."""
    prompt, completion = np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)
    strided = np.array([8, 0, 9, 0], np.int32)[::2]
    assert completion_key(prompt, strided) == completion_key(prompt, completion)
    assert completion_key(prompt.astype(np.int64), completion) == completion_key(prompt, completion)


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_CACHE", "/some/where")
    assert default_cache_dir() == Path("/some/where")
    monkeypatch.delenv("DPO_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "dpo"
    monkeypatch.setenv("DPO_CACHE", "~/mine")
    assert default_cache_dir() == Path.home() / "mine"


# --- rows ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    have=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=20),
    wanted=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=20),
)
def test_find_with_many_keys_that_share_their_first_half(
    have: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    """The oracle is a dict; halves are drawn from so few numbers that most collide."""
    table = np.array([(high, low, -10.0 * high - low) for high, low in have], ROW)
    rows = make_rows(table)
    assert as_dict(rows) == {(high, low): -10.0 * high - low for high, low in have}
    places = rows.find(np.array(wanted, np.uint64).reshape(-1, 2))
    found = [None if place < 0 else (int(rows.high[place]), int(rows.low[place])) for place in places]
    assert found == [key if key in set(have) else None for key in wanted]


def test_values_come_back_to_the_last_bit(tmp_path: Path) -> None:
    keys, _ = random_rows(1, 5)
    logps = np.array([-0.0, -5e-324, -1 / 3, float(np.float32(-0.1)), -1e300])
    write_rows(tmp_path, keys, logps)
    rows = read_rows(tmp_path)
    found = rows.logps[rows.find(keys)]
    assert found.tolist() == logps.tolist()
    assert np.signbit(found[0])
    assert (split_keys([key.tobytes() for key in keys]) == keys).all()


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_no_folder_is_no_rows(tmp_path: Path) -> None:
    assert len(read_rows(tmp_path / "absent")) == 0


def test_the_name_of_a_block_is_the_hash_of_its_bytes(tmp_path: Path) -> None:
    path = write_rows(tmp_path, *random_rows(2, 4))
    assert path.stat().st_size == 4 * 24
    assert path.name == f"rows-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.bin"
    assert write_rows(tmp_path, *random_rows(2, 4)) == path  # again: the same file, not a second one
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "longer"])
def test_a_damaged_block_is_removed_and_the_others_stay(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_rows(tmp_path, *random_rows(3, 6)), write_rows(tmp_path, *random_rows(4, 5))
    content = bad.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    broken = {"truncated": content[:24], "flipped": flipped, "empty": b"", "longer": content + bytes(24)}[damage]
    bad.write_bytes(broken)
    rows = read_rows(tmp_path)
    assert sorted(as_dict(rows)) == sorted((int(h), int(lo)) for h, lo in random_rows(3, 6)[0])
    assert f"{bad} is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def test_a_block_that_another_job_removed_in_between_is_no_error(tmp_path: Path) -> None:
    """Two jobs list a damaged block, the first one removes it: the second finds the name and no file behind it."""
    write_rows(tmp_path, *random_rows(5, 3))
    (tmp_path / f"rows-{'0' * 32}.bin").symlink_to(tmp_path / "gone")
    assert len(read_rows(tmp_path)) == 3


def test_a_half_written_draft_is_never_read(tmp_path: Path) -> None:
    """What `kill -9` leaves in the middle of a write: a draft beside the blocks."""
    block = write_rows(tmp_path, *random_rows(6, 3))
    (tmp_path / f".{block.name}.{'0' * 32}").write_bytes(block.read_bytes()[:30])
    assert len(read_rows(tmp_path)) == 3


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old content stands until the new is on disk: a crash before the rename changes nothing."""
    target = tmp_path / "folder" / "about.json"
    write_atomically(target, b"old")

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"


# --- two jobs --------------------------------------------------------------------------------------------------------


def write_and_read(folder: str, seed: int) -> int:
    """Adds 40 blocks of 5 rows, ten of them those that the other job writes too, reading all after each."""
    for block in range(40):
        write_rows(Path(folder), *random_rows(block if block < 10 else 1000 * seed + block, 5))
        read_rows(Path(folder))
    return seed


def write_own(folder: str) -> int:
    """`write_and_read` as the job of this process's number."""
    return write_and_read(folder, 1 + int(os.environ["RANK"]))


@pytest.mark.xdist_group("ranks")
def test_two_jobs_write_at_the_same_time(ranks: Ranks, tmp_path: Path) -> None:
    """10 blocks in common and 30 of each: 70 blocks of 5 rows, none damaged, none lost."""
    ranks(2, write_own, str(tmp_path))
    assert len(list(tmp_path.glob("rows-*.bin"))) == 70
    assert len(read_rows(tmp_path)) == 350
    assert not list(tmp_path.glob(".*"))
