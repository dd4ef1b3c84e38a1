"""Folders of the cache: what killed starts leave in it."""

import os
import time
from pathlib import Path

import pytest

from dpo.sources.kept import find_fault, keep_folder


def left(cache: Path, name: str, hours: float) -> Path:
    """A folder that was last changed so many hours ago, with a file of 2,000 bytes an hour older."""
    folder = cache / name
    (folder / "aa").mkdir(parents=True)
    (folder / "aa" / "aa-00000.arrow").write_bytes(bytes(2000))
    for age, path in ((1, folder / "aa" / "aa-00000.arrow"), (0, folder / "aa"), (0, folder)):
        changed = time.time() - 3600 * (hours + age)
        os.utime(path, (changed, changed))
    return folder


def test_folders_that_killed_starts_have_left_are_removed_after_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = [left(tmp_path, f".{letter * 32}.{kind}", 25) for letter, kind in (("a", "draft"), ("b", "damaged"))]
    others = [left(tmp_path, f".{'c' * 32}.draft", 23), left(tmp_path, ".mine.draft", 25), left(tmp_path, "d" * 32, 25)]
    caplog.set_level("INFO")
    keep_folder(tmp_path / "tokens-ee", lambda draft: (draft / "ee").touch(), find_fault)
    assert not any(folder.exists() for folder in old) and all(folder.exists() for folder in others)
    assert (tmp_path / "tokens-ee" / "ee").is_file()
    removed = [message for message in caplog.messages if "a killed start has left" in message]
    assert sorted(removed) == [f"cache: removed {folder}, 2.0 KiB, which a killed start has left" for folder in old]


def test_a_folder_that_is_written_since_long_is_not_removed(tmp_path: Path) -> None:
    """Its file has changed lately; the folders above it have not."""
    folder = left(tmp_path, f".{'a' * 32}.draft", 48)
    (folder / "aa" / "aa-00000.arrow").write_bytes(b"more")
    for path in (folder / "aa", folder):
        os.utime(path, (1, 1))
    keep_folder(tmp_path / "tokens-ee", lambda draft: (draft / "ee").touch(), find_fault)
    assert folder.is_dir()
