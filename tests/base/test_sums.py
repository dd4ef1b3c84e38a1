"""SHA256SUMS of a folder, against coreutils' sha256sum."""

import hashlib
from pathlib import Path

import pytest

from dpo.base.sums import SUMS, find_fault, find_unlisted, is_plain_name, lies_within, read_sums
from tests.support.sums import write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one below, with SHA256SUMS."""
    (tmp_path / "code").mkdir()
    (tmp_path / "a.bin").write_bytes(b"hello\n")
    (tmp_path / "code" / "b c.py").write_bytes(b"")
    write_sums(tmp_path)
    return tmp_path


def test_the_form_is_that_of_sha256sum(folder: Path):
    # The digests of "hello\n" and of nothing, as `sha256sum` of coreutils 9.1 prints them.
    hello = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert (folder / SUMS).read_text() == f"{hello}  a.bin\n{nothing}  code/b c.py\n"
    assert read_sums(folder) == {"a.bin": hello, "code/b c.py": nothing}
    assert find_fault(folder) is None


def test_a_changed_bit_a_missing_file_and_damaged_sums_are_found(folder: Path):
    (folder / "new").write_bytes(b"not listed")
    assert find_fault(folder) is None
    (folder / "a.bin").write_bytes(b"hellp\n")
    assert find_fault(folder) == "a.bin has changed"
    (folder / "a.bin").unlink()
    assert find_fault(folder) == "a.bin is missing"
    (folder / "a.bin").mkdir()
    assert find_fault(folder) == "a.bin is missing"


@pytest.mark.parametrize("content", [b"", b"no sums\n", b"\xff", b"0" * 64 + b"  ../a.bin\n", b"0" * 63 + b"  a.bin\n"])
def test_damaged_sums_are_no_sums(folder: Path, content: bytes):
    (folder / SUMS).write_bytes(content)
    assert read_sums(folder) is None
    assert find_fault(folder) == f"{SUMS} is missing or damaged"
    (folder / SUMS).unlink()
    assert find_fault(folder) == f"{SUMS} is missing or damaged"


def test_a_file_that_sums_have_lost_is_named(folder: Path):
    sums = read_sums(folder)
    assert sums and find_unlisted(sums, ["a.bin"]) is None
    assert find_unlisted(sums, ["a.bin", "z", "new"]) == f"new is not in {SUMS}"


def test_names_that_leave_the_folder_are_known():
    inside = ["a", "a/b", ".a", "a..b", "..."]
    outside = ["", "/a", "..", "a/../b", "../a", "a\\b", "a\0b"]
    assert [lies_within(name) for name in inside + outside] == [True] * 5 + [False] * 7
    assert [is_plain_name(name) for name in ["a", ".a", "a/b", ".", "..", ""]] == [True, True] + [False] * 4


def test_large_files_are_read_in_parts(tmp_path: Path):
    content = bytes(range(256)) * 2**13  # 2 MiB
    (tmp_path / "large").write_bytes(content)
    write_sums(tmp_path)
    assert read_sums(tmp_path) == {"large": hashlib.sha256(content).hexdigest()}
