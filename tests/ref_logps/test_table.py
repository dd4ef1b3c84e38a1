"""The table of a run's reference rows: right for every key, made anew where its blocks or itself are not whole."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.base.errors import RunError
from dpo.ref_logps import table as ref_table
from dpo.ref_logps.blocks import first_of_each, write_rows
from dpo.ref_logps.table import find_table, open_table, table_name, write_table

NAME = table_name(["a" * 32, "b" * 32])


def random_rows(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys (number, 2), sorted, and log-probabilities (number,)."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**64, (number, 2), dtype=np.uint64)
    return keys[first_of_each(keys)], -100 * rng.random(number)


@pytest.mark.parametrize("number", [0, 1, 255, 256, 257, 2000])
def test_every_key_is_found(tmp_path: Path, number: int) -> None:
    keys, logps = random_rows(0, number)
    write_rows(tmp_path, keys[::2], logps[::2])
    write_rows(tmp_path, keys[1::2], logps[1::2])
    table = open_table(write_table(tmp_path, NAME, keys))
    assert [table.logp(key.tobytes()) for key in keys] == logps.tolist()
    assert len(table) == number
    for other in random_rows(1, 20)[0]:
        with pytest.raises(KeyError):
            table.logp(other.tobytes())


@settings(max_examples=60, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1), st.integers(1, 5))
def test_keys_that_share_their_first_half(
    tmp_path_factory: pytest.TempPathFactory, have: set[tuple[int, int]], rows_per_page: int
) -> None:
    """Many pages begin with the same half; the oracle is a dict."""
    folder = tmp_path_factory.mktemp("table")
    keys = np.array(sorted(have), np.uint64)
    write_rows(folder, keys, np.array([-31.0 * high - low for high, low in sorted(have)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ref_table, "ROWS_PER_PAGE", rows_per_page)
        table = open_table(write_table(folder, NAME, keys))
        for high in range(5):
            for low in range(31):
                key = np.array([high, low], np.uint64).tobytes()
                if (high, low) in have:
                    assert table.logp(key) == -31.0 * high - low
                else:
                    with pytest.raises(KeyError):
                        table.logp(key)


def test_a_table_is_found_as_long_as_its_blocks_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More blocks change nothing; a damaged one of its own, or a lost one, and the table does not hold."""
    keys, logps = random_rows(2, 10)
    blocks = [write_rows(tmp_path, keys[:5], logps[:5]), write_rows(tmp_path, keys[5:], logps[5:])]
    path = write_table(tmp_path, NAME, keys)
    write_rows(tmp_path, *random_rows(3, 4))
    assert find_table(tmp_path, NAME) == path
    assert find_table(tmp_path, table_name(["b" * 32, "a" * 32])) is None
    content = blocks[0].read_bytes()
    blocks[0].write_bytes(content[:-1] + b"?")
    assert find_table(tmp_path, NAME) is None
    blocks[0].write_bytes(content)
    assert find_table(tmp_path, NAME) == path
    assert not capsys.readouterr().err
    blocks[1].unlink()
    assert find_table(tmp_path, NAME) is None
    assert f"{blocks[1]} is missing; its rows are computed again" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["table-*.npy", "index-*.json"])
def test_a_table_with_any_flipped_bit_is_removed_and_told(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each byte once: also one in the name of a key, of a block, or of the file of rows."""
    keys, logps = random_rows(4, 10)
    write_rows(tmp_path, keys, logps)
    path = write_table(tmp_path, NAME, keys)
    (file,) = tmp_path.glob(form)
    content = file.read_bytes()
    changed = [bytes([*content[:i], content[i] ^ 1 << i % 8, *content[i + 1 :]]) for i in range(len(content))]
    spaces = [i for i, byte in enumerate(content) if form.endswith("json") and byte in b" \n"]
    for i, damaged in enumerate(
        [content[:-1], content[:0], *(one for i, one in enumerate(changed) if i not in spaces)]
    ):
        file.write_bytes(damaged)
        assert find_table(tmp_path, NAME) is None, i
        assert capsys.readouterr().err.endswith(f"reference cache: {file} is damaged and is made again\n"), i
        assert not file.exists()
        assert write_table(tmp_path, NAME, keys) == path == find_table(tmp_path, NAME)
    assert file.read_bytes() == content


@pytest.mark.parametrize("other", ["about.json", "made-0.json", "of other data"])
def test_another_files_json_is_no_table(tmp_path: Path, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of JSON that were swapped: the facts of the reference, of a block, or of a table of other completions."""
    keys, logps = random_rows(4, 10)
    write_rows(tmp_path, keys, logps)
    path = write_table(tmp_path, NAME, keys)
    contents = {"about.json": '{"model": "ab"}', "made-0.json": '{"torch": "2.9", "compile": false}'}
    foreign = tmp_path / table_name(["c" * 32])
    write_table(tmp_path, foreign.name, keys[:5])
    (tmp_path / NAME).write_text(contents.get(other) or foreign.read_text())
    assert find_table(tmp_path, NAME) is None
    assert f"{tmp_path / NAME} is damaged and is made again" in capsys.readouterr().err
    assert write_table(tmp_path, NAME, keys) == path == find_table(tmp_path, NAME)


@pytest.mark.parametrize(
    ("rows", "blocks"),
    [
        ("../../home/thesis.tex", []),
        ("thesis.tex", []),
        ("table-/../../../home/thesis.tex", []),
        ("table-" + "0" * 32 + ".npy\n", []),
        (3, []),
        ("table-" + "0" * 32 + ".npy", ["../rows-" + "0" * 32 + ".bin"]),
        ("table-" + "0" * 32 + ".npy", 3),
    ],
)
def test_only_files_of_the_cache_are_taken_or_removed(tmp_path: Path, rows: object, blocks: object) -> None:
    """Facts with their own right hash, as someone writes them who shares the cache: another's file stays."""
    thesis, inside = tmp_path / "home" / "thesis.tex", tmp_path / "cache" / "key" / "thesis.tex"
    for file in (thesis, inside):
        file.parent.mkdir(parents=True)
        file.write_text("years of work")
    about = {"rows": rows, "blocks": blocks, "made": []}
    digest = hashlib.sha256(json.dumps([NAME, about], sort_keys=True).encode()).hexdigest()
    (inside.parent / NAME).write_text(json.dumps({"sha256": digest, "about": about}))
    assert find_table(inside.parent, NAME) is None
    assert thesis.exists() and inside.exists()
    assert not (inside.parent / NAME).exists()


def test_a_table_of_an_older_version_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its JSON file has the name of the data without a hash of its own: a job of that version reads it meanwhile."""
    keys, logps = random_rows(4, 10)
    block = write_rows(tmp_path, keys, logps)
    older = tmp_path / NAME.replace("index-", "table-")
    content = json.dumps({"rows": "table-0.npy", "blocks": [block.name], "made": []})
    older.write_text(content)
    assert find_table(tmp_path, NAME) is None
    assert write_table(tmp_path, NAME, keys) == find_table(tmp_path, NAME)
    assert older.read_text() == content
    assert capsys.readouterr().err == ""


def test_a_table_that_changes_while_ranks_open_it_is_refused(tmp_path: Path) -> None:
    """Each rank hashes the file that it reads: rank 0 found it whole, this rank's file system shows another content."""
    keys, logps = random_rows(6, 300)
    write_rows(tmp_path, keys, logps)
    path = write_table(tmp_path, NAME, keys)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the last bit of a log-probability
    path.write_bytes(content)
    with pytest.raises(RunError, match="not every rank sees"):
        open_table(path)


def test_a_key_without_a_row_is_an_error(tmp_path: Path) -> None:
    keys, logps = random_rows(5, 10)
    write_rows(tmp_path, keys[1:], logps[1:])
    with pytest.raises(RunError, match="1 rows are gone"):
        write_table(tmp_path, NAME, keys)


def test_a_rank_that_does_not_see_the_table_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not every rank sees"):
        open_table(tmp_path / "table-0.npy")
