"""The marker of a checkpoint: it lists all files that are there, plain ones, and finds each that has changed."""

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo.base.errors import RunError
from dpo.checkpoint.marker import MARKER, list_files, own_files, read_marker
from dpo.checkpoint.verify import find_fault, find_fault_together, first_usable
from dpo.distributed.startup import open_world
from tests.support.checkpoints import flip, forget_hash, remark, save, shelf_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one rank; to be copied."""
    with open_world(60) as world:
        return save(shelf_of(tmp_path_factory.mktemp("marker"), None, world), 1)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "step-000001"))


def edit(folder: Path, **changes: Any) -> None:
    """Changes entries of the marker; None removes one."""
    files = {name.replace("metadata", ".metadata").replace("_json", ".json"): facts for name, facts in changes.items()}
    entries = json.loads((folder / MARKER).read_text()) | files
    (folder / MARKER).write_text(json.dumps({name: facts for name, facts in entries.items() if facts is not None}))


def test_every_file_is_listed_with_its_hash(folder: Path) -> None:
    files = read_marker(folder)
    assert files is not None
    assert sorted(files) == [".metadata", "__0_0.distcp", "state.json"]
    assert all(size == (folder / name).stat().st_size and digest for name, (size, digest) in files.items())
    assert find_fault(folder) is None


MARKERS = {
    "{}": "it is not complete: COMPLETE does not list .metadata",
    "[]": "COMPLETE is broken",
    "3": "COMPLETE is broken",
    "null": "COMPLETE is broken",
    "": "COMPLETE is broken",
    "[" * 100_000: "COMPLETE is broken",
    '{"a": 3}': "COMPLETE is broken",
    '{"a": [1, 2, 3]}': "COMPLETE is broken",
    '{"a": ["1", null]}': "COMPLETE is broken",
    '{"a": [true, null]}': "COMPLETE is broken",
    '{"a": [1, "0123"]}': "COMPLETE is broken",
    '{"../a": [1, null]}': "COMPLETE is broken",
    '{"a/b": [1, null]}': "COMPLETE is broken",
    '{"COMPLETE": [1, null]}': "COMPLETE is broken",
}


@pytest.mark.parametrize("text, fault", MARKERS.items(), ids=[text[:20] for text in MARKERS])
def test_a_marker_that_is_none(folder: Path, text: str, fault: str) -> None:
    (folder / MARKER).write_text(text)
    assert find_fault(folder) == fault


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"metadata": None}, "it is not complete: COMPLETE does not list .metadata"),
        ({"state_json": None}, "it is not complete: COMPLETE does not list state.json"),
        ({"__1_0": [3, None]}, "__1_0 is missing"),
        ({"__0_0": None}, None),
    ],
)
def test_a_marker_that_lists_other_files(folder: Path, changes: dict[str, Any], fault: str | None) -> None:
    edit(folder, **changes)
    assert find_fault(folder) == fault


def test_a_marker_that_lists_a_part(folder: Path) -> None:
    """A shard that is not listed, there or not: `.metadata` says that tensors lie in it."""
    entries = json.loads((folder / MARKER).read_text())
    del entries["__0_0.distcp"]
    (folder / MARKER).write_text(json.dumps(entries))
    assert find_fault(folder) == "__0_0.distcp is not listed in COMPLETE"
    (folder / "__0_0.distcp").unlink()
    assert find_fault(folder) == "__0_0.distcp is not listed in COMPLETE"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json"])
def test_every_bit_counts(folder: Path, name: str) -> None:
    """A change of the size is seen without reading; one bit by the hash."""
    flip(folder / name)
    assert list_files(folder)[1] is None
    assert find_fault(folder) == f"{name} has changed"
    size = (folder / name).stat().st_size
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert list_files(folder)[1] == f"{name} has changed: {size + 1} bytes of {size}"
    (folder / name).unlink()
    assert list_files(folder)[1] == f"{name} is missing"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", MARKER])
def test_a_link_is_no_file_of_a_checkpoint(folder: Path, tmp_path: Path, name: str) -> None:
    """Even one that leads to the very bytes."""
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert (find_fault(folder) or "").startswith(f"{name} is a link")


def test_a_folder_is_no_file_of_a_checkpoint(folder: Path) -> None:
    (folder / "state.json").unlink()
    (folder / "state.json").mkdir()
    assert find_fault(folder) == "state.json is a link or not a file"


def test_files_that_are_left_do_not_count(folder: Path) -> None:
    """Of NFS, of desktops, of people; a shard that no marker lists is no such file."""
    for name in (".nfs0000", ".DS_Store", "Thumbs.db", "NOTES.txt"):
        (folder / name).write_text("")
    assert find_fault(folder) is None
    (folder / "__1_0.distcp").write_text("")
    assert find_fault(folder) == "__1_0.distcp is not listed in COMPLETE"


def test_files_that_are_left_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".nfs0000", "Thumbs.db", "NOTES.txt"):
        (folder / name).write_text("")
    with open_world(60) as world:
        assert find_fault_together(folder, world) is None
    assert f"checkpoint {folder}: not of the checkpoint, and not looked at: NOTES.txt, Thumbs.db\n" in (
        capsys.readouterr().err
    )


def test_a_folder_that_is_a_link_is_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert find_fault(tmp_path / "link") is None


def test_a_file_that_cannot_be_read_is_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk cannot give it back. Not an error of one rank, for which the others would wait."""
    monkeypatch.setattr("dpo.checkpoint.marker.sha256_of", failing(errno.EIO))
    assert find_fault(folder) == ".metadata cannot be read: Input/output error"
    monkeypatch.setattr("dpo.checkpoint.marker.read_marker", failing(errno.EIO))
    assert find_fault(folder) == "it cannot be read: Input/output error"


def failing(code: int) -> Callable[[Path], Any]:
    """A reader that fails without the name of the file, as read(2) does."""

    def fail(path: Path) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize(
    "reader, name",
    [("marker.sha256_of", ".metadata"), ("marker.read_marker", MARKER), ("metadata.Path.read_bytes", ".metadata")],
)
def test_an_error_of_the_moment_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reader: str, name: str, code: int
) -> None:
    """It ends the start with the path: an older checkpoint in the place of this one would cost hours."""
    monkeypatch.setattr(f"dpo.checkpoint.{reader}", failing(code))
    with pytest.raises(RunError, match=f"^{re.escape(str(folder / name))} cannot be read: {os.strerror(code)}; "):
        find_fault(folder)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_of_the_moment_ends_all_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr("dpo.checkpoint.marker.sha256_of", failing(code))
    with open_world(60) as world, pytest.raises(RunError, match=r"/\.metadata cannot be read: "):
        first_usable([folder], world)


def test_a_file_without_a_hash_is_compared_by_its_size(folder: Path) -> None:
    """Markers of older versions have none for files over 64 MiB."""
    forget_hash(folder, "__0_0.distcp")
    flip(folder / "__0_0.distcp")
    assert find_fault(folder) is None
    with (folder / "__0_0.distcp").open("ab") as file:
        file.write(b" ")
    assert (find_fault(folder) or "").startswith("__0_0.distcp has changed: ")


def test_a_file_that_metadata_names_must_be_listed(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder / "__1_0.distcp")
    (folder / MARKER).unlink()
    remark(folder)
    assert find_fault(folder) == "__0_0.distcp is not listed in COMPLETE"


def test_each_file_is_one_ranks(whole: Path) -> None:
    """The shards those of the rank that wrote them, also of more ranks than there are; the rest rank 0's."""
    names = [".metadata", "state.json", *(f"__{rank}_{part}.distcp" for rank in range(12) for part in range(2))]
    assert own_files(names, 0, 12) == [".metadata", "state.json", "__0_0.distcp", "__0_1.distcp"]
    assert own_files(names, 11, 12) == ["__11_0.distcp", "__11_1.distcp"]
    for size in (1, 2, 5, 12, 20):
        parts = [own_files(names, rank, size) for rank in range(size)]
        assert sorted(name for part in parts for name in part) == sorted(names)
        assert max(map(len, parts)) <= 2 * -(-12 // size) + 2


def damage(folder: Path, rng: random.Random) -> None:
    """Cuts, flips, removes, swaps, empties or extends files."""
    first, second = rng.sample(sorted(folder.iterdir()), 2)
    content = bytearray(first.read_bytes())
    match rng.choice(["cut", "flip", "remove", "swap", "empty", "extend", "zero"]):
        case "cut":
            first.write_bytes(content[: rng.randrange(len(content))])
        case "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            first.write_bytes(content)
        case "remove":
            first.unlink()
        case "swap":
            first.write_bytes(second.read_bytes())
            second.write_bytes(content)
        case "empty":
            first.write_bytes(b"")
        case "extend":
            first.write_bytes(content + b"\0")
        case "zero":
            begin = rng.randrange(len(content))
            first.write_bytes(content[:begin] + bytes(len(content[begin : begin + 100])) + content[begin + 100 :])


def test_of_200_damages_none_is_silent(whole: Path, tmp_path: Path) -> None:
    """Each is one line. A marker may be written otherwise and say the same: it is compared by what it says."""
    contents = {path.name: path.read_bytes() for path in whole.iterdir() if path.name != MARKER}
    marker = read_marker(whole)
    for seed in range(200):
        folder = Path(shutil.copytree(whole, tmp_path / str(seed)))
        damage(folder, random.Random(seed))
        fault = find_fault(folder)
        others = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARKER}
        is_same = others == contents and (folder / MARKER).exists() and read_marker(folder) == marker
        assert (fault is None) == is_same and "\n" not in (fault or ""), seed
        shutil.rmtree(folder)
