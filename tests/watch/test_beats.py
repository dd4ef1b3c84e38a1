"""A node that cannot be watched runs all the same."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from dpo.watch import beats
from dpo.watch.beats import beating, stand
from dpo.watch.slots import look


def numbers(rank: int) -> dict[str, int]:
    return {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOSPC])
def test_a_rank_whose_slot_cannot_be_made_runs_on(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The watcher has removed the folder since the first rank is gone, or others have taken the room."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path / ".1"))

    store = dist.HashStore()
    store.set("slots of the node of rank 0", str(tmp_path))
    monkeypatch.setattr(beats, "Slot", fail)
    with beating(numbers(1), store, 20.0) as slots:
        stand("the forward pass", 1)
        assert slots is None
    said = capsys.readouterr().err
    assert "rank 1 runs without the watcher of its node (" in said and str(tmp_path / ".1") in said


def test_a_node_on_which_no_process_starts_runs_without_its_watcher_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of processes of the user is bounded, as in a container."""

    def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    folder = tmp_path / "slots"
    folder.mkdir()
    monkeypatch.setattr(beats, "make_folder", lambda _: folder)
    monkeypatch.setattr(subprocess, "Popen", fail)
    with beating(numbers(0), dist.HashStore(), 20.0) as slots:
        stand("the forward pass", 1)
        assert slots == folder and look(folder)[0].place == "the forward pass of step 1"
    assert "all ranks of the node of rank 0 run without its watcher (BlockingIOError" in capsys.readouterr().err
    assert not folder.exists()


def test_a_first_rank_without_a_slot_says_that_its_node_is_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not start the watcher, and the other ranks do not know."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / ".0"))

    monkeypatch.setattr(beats, "make_folder", lambda _: tmp_path)
    monkeypatch.setattr(beats, "Slot", fail)
    with beating(numbers(0), dist.HashStore(), 20.0) as slots:
        assert slots is None
    assert "all ranks of the node of rank 0 run without its watcher (" in capsys.readouterr().err


def test_a_full_disk_of_torchruns_logs_does_not_turn_off_the_watcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file there tells where a killed rank was; the slots are in memory."""

    def fail(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    store = dist.HashStore()
    store.set("slots of the node of rank 0", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "logs" / "error.json"))
    monkeypatch.setattr(Path, "touch", fail)
    with beating(numbers(1), store, 20.0) as slots:
        assert slots == tmp_path
    assert "watcher" not in capsys.readouterr().err
