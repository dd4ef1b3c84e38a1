"""A home folder that is small or nearly full is told once, with the variables that name other folders."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants

from dpo.base import space
from dpo.base.files import default_cache_dir
from dpo.disk import home
from dpo.disk.home import Cache, caches_of_run, describe_small_home

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int]:
    """A home folder whose file system has the GiB `total`, of which `free`, and no quota."""
    sizes = {"total": 500, "free": 200}
    monkeypatch.setenv("HOME", str(tmp_path))

    def usage(folder: Path) -> Usage:
        return Usage(sizes["total"] * GIB, 0, sizes["free"] * GIB)

    def reserve(folder: Path, num_bytes: int) -> None:
        if num_bytes > sizes["free"] * GIB:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(space, "_reserve", reserve)
    return sizes


@pytest.mark.parametrize(
    ("total", "free", "billions", "told"),
    [
        (500, 200, 8, False),
        (500, 10, 8, True),  # another model of 15 GiB does not fit
        (500, 20, 8, False),
        (50, 40, 8, True),  # a small home, a large model
        (50, 40, 1, False),
        (50, 1, 1, True),
        (99, 90, 5.4, True),
        (99, 90, 5.3, False),  # 9.9 GiB
        (100, 90, 8, False),
    ],
)
def test_the_rule(disk: dict[str, int], tmp_path: Path, total: int, free: int, billions: float, told: bool) -> None:
    disk |= {"total": total, "free": free}
    number = int(billions * 1e9)
    caches = [Cache(tmp_path / ".cache" / "huggingface", 2 * number)]
    line = describe_small_home(caches, number)
    assert (line is not None) == told
    if line:
        assert line == (
            f"home folder: {tmp_path}/.cache/huggingface: {free}.0 GiB of {total}.0 GiB are free there by its file "
            "system, and a quota may allow less; HF_HOME and DPO_CACHE name other folders"
        )


def test_folders_elsewhere_are_not_told(disk: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder is another disk: another device than that of the caches."""
    disk |= {"total": 10, "free": 0}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(home, "_device_of", lambda home: -1)
    assert describe_small_home([Cache(tmp_path / "scratch", 100 * GIB)], 10**10) is None
    assert describe_small_home([Cache(tmp_path / "home" / "x", 100 * GIB)], 10**10) is None  # it does not exist
    (tmp_path / "home").mkdir()
    assert describe_small_home([Cache(tmp_path / "home" / "x", 100 * GIB)], 10**10) is not None


def test_the_caches_of_a_run() -> None:
    hub, own = caches_of_run()
    assert (hub.folder, hub.needed) == (Path(constants.HF_HOME), 0)
    assert (own.folder, own.needed) == (default_cache_dir(), GIB)
