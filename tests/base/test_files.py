"""Files that are written, and folders that are removed, as a whole or not at all."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.base.files import naming, nearest_existing, remove_folder, replace_folder, sync, write_atomically


def hold_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NFS does while a process has a file of each folder open: it stays, as .nfs..., and so does the folder."""
    rmtree = shutil.rmtree

    def leave_one(folder: Path, ignore_errors: bool = False, **_: Any) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if files and not files[0].name.startswith(".nfs"):
            files[0].rename(files[0].with_name(".nfs0000"))
        for path in files[1:]:
            path.unlink()
        if not files:
            rmtree(folder)
        elif not ignore_errors:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", leave_one)


def test_a_folder_is_gone_though_a_file_of_it_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("a")
    (tmp_path / "old" / "b").write_text("b")
    with monkeypatch.context() as patch:
        hold_a_file(patch)
        remove_folder(tmp_path / "old", "left")
        assert sorted(path.name for path in tmp_path.rglob("*")) == [".nfs0000", "left"]
        (tmp_path / "old").mkdir()  # the name is free
    remove_folder(tmp_path / "left", "left-2")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_that_does_not_exist_is_removed_already(tmp_path: Path) -> None:
    remove_folder(tmp_path / "none", "other")
    assert list(tmp_path.iterdir()) == []


def test_of_a_link_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_text("a")
    for name in ("link", "broken"):
        (tmp_path / name).symlink_to(tmp_path / ("files" if name == "link" else "none"))
        remove_folder(tmp_path / name, "left")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "files"]


@pytest.mark.parametrize("before", [None, "folder", "file", "link", "broken link"])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, before: str | None) -> None:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "new").write_text("new")
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "target"
    if before == "folder":
        target.mkdir()
        (target / "old").write_text("old")
    elif before == "file":
        target.write_text("old")
    elif before:
        target.symlink_to(tmp_path / ("elsewhere" if before == "link" else "none"))
    replace_folder(tmp_path / "draft", target, "left")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "new", "target"]
    assert not target.is_symlink()


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have no such thing, and say EINVAL. Of a file, and for another reason, it is one."""

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "file").write_text("")
    number = errno.EINVAL
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument") as raised:
        sync(tmp_path / "file")
    assert raised.value.filename == str(tmp_path / "file")  # fsync(2) knows no name
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)


def test_the_nearest_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path == nearest_existing(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert nearest_existing(Path("a")) == tmp_path


def test_a_file_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a write to a full disk names no file and no size, and a draft would take room that is missing."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/report.json'\nto write: 2.0 KiB$"):
        write_atomically(tmp_path / "report.json", bytes(2048))
    assert list(tmp_path.iterdir()) == []


def test_a_short_write_of_numpy_is_a_full_disk() -> None:
    """numpy says how many elements were written, and not why no more: /dev/full takes none."""
    with (
        pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: 'rows.npy'$"),
        naming(Path("rows.npy")),
        Path("/dev/full").open("wb") as file,
    ):
        np.arange(10_000).tofile(file)


@pytest.mark.parametrize("failure", [OSError("no number"), OSError(errno.EIO, "Input/output error", "named")])
def test_other_errors_keep_their_words(failure: OSError) -> None:
    with pytest.raises(OSError) as raised, naming(Path("rows.npy")):
        raise failure
    assert raised.value is failure


@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.ENETUNREACH, -2])
def test_an_error_of_a_connection_gets_no_file(tmp_path: Path, number: int) -> None:
    """-2: the name of a host is unknown."""
    with pytest.raises(OSError) as raised, naming(tmp_path):
        raise OSError(number, "no connection")
    assert raised.value.filename is None
