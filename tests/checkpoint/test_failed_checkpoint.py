"""A checkpoint that cannot be written leaves nothing behind that harms the next one."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlanner

from dpo.base.errors import FolderLost, RunError
from dpo.checkpoint import export as exporting
from dpo.checkpoint import folders, saver
from dpo.checkpoint.export import draft_of
from dpo.checkpoint.final_sums import find_fault_of_export, write_sums_together
from dpo.checkpoint.folders import checkpoint_path, step_of
from dpo.checkpoint.plans import forget_plans
from dpo.checkpoint.state import RunState
from dpo.checkpoint.store import Shelf, write_checkpoint
from dpo.distributed.startup import open_world
from dpo.distributed.world import World
from tests.base.test_files import hold_a_file
from tests.support.checkpoints import newest_checkpoint, shelf_of
from tests.support.processes import start

WRITER = ("prepare_local_plan", "prepare_global_plan", "write_data", "finish")
"""What a storage writer is asked for, in this order: each rank, rank 0, each rank, rank 0."""


@pytest.fixture
def world() -> Iterator[World]:
    """This process alone, with no plans left behind."""
    with open_world(60) as world:
        yield world
    forget_plans("failing")


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full the first time that this process asks its writer for `name`."""
    method, calls = getattr(dcp.FileSystemWriter, name), []

    def failing(writer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return method(writer, *args, **kwargs)

    monkeypatch.setattr(dcp.FileSystemWriter, name, failing)


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.arange(6.0) + 100 * step}}


def save(folder: Path, step: int, world: World, keep: int | None = None) -> str:
    """The message of a failed save; empty for one that was written and is read back bit for bit."""
    assert dist.group.WORLD is not None
    try:
        shelf = Shelf(folder, keep, "failing", world, dist.group.WORLD)
        write_checkpoint(shelf, RunState(step, {}), tensors(step), lambda: None)
    except RunError as failure:
        return str(failure)
    found = tensors(0)
    dcp.load(found, checkpoint_id=str(checkpoint_path(folder, step)))
    assert torch.equal(found["model"]["weight"], tensors(step)["model"]["weight"])
    return ""


@pytest.mark.parametrize("name", WRITER)
def test_one_failure_leaves_the_next_checkpoints_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World, name: str
) -> None:
    """The first checkpoint of a run fails; the next two, the second of which uses kept plans, are whole."""
    fail_once(monkeypatch, name)
    assert "the disk is full" in save(tmp_path, 1, world)
    assert [save(tmp_path, step, world) for step in (2, 3)] == ["", ""]
    assert "failing" in SavePlanner._cached_all_plans


def test_failures_with_a_success_between_them_end_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    """Saves 1, 3, 5 and 6 fail. Of 5 and 6, two in succession, the next call tells."""
    monkeypatch.setattr(saver, "state_tensors", lambda *_: {})

    def write(shelf: Shelf, state: RunState, *others: Any) -> None:
        if state.step in (1, 3, 5, 6):
            raise RunError(f"save {state.step}")

    monkeypatch.setattr(saver, "write_checkpoint", write)
    saving = saver.Saver(shelf_of(tmp_path, None, world), torch.nn.Linear(1, 1), None)  # type: ignore[arg-type]
    for step in range(1, 7):
        saving.save(RunState(step, {}), lambda: None)
    with pytest.raises(RunError, match="save 6"):
        saving.save(RunState(7, {}), lambda: None)


def test_a_draft_that_cannot_be_removed_hides_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    """An OSError of rank 0 alone would end it at the next save, where the other ranks go on and wait for it."""
    fail_once(monkeypatch, "write_data")

    def stale(folder: Path, name: str) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "remove_folder", stale)
        assert "the disk is full" in save(tmp_path, 1, world)
    assert save(tmp_path, 2, world) == ""


@pytest.mark.parametrize("lost", [1, 2])
def test_who_has_lost_the_folder_removes_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World, lost: int
) -> None:
    """The other start writes step 1 as well: before this process makes its draft, or before its writing fails."""
    assert dist.group.WORLD is not None
    draft, checks = checkpoint_path(tmp_path, 1).with_suffix(".tmp"), []

    def check_lock() -> None:
        checks.append(None)
        if len(checks) == lost:
            raise FolderLost("train.run_dir: not this run's any more")

    if lost == 1:
        draft.mkdir(parents=True)
    fail_once(monkeypatch, "write_data")
    shelf = Shelf(tmp_path, None, "failing", world, dist.group.WORLD, check_lock=check_lock)
    with pytest.raises(RunError, match="not this run's any more" if lost == 1 else "the disk is full"):
        write_checkpoint(shelf, RunState(1, {}), tensors(1), lambda: None)
    assert draft.is_dir() and len(checks) == lost


def test_the_files_below_an_exported_model_are_listed_too(tmp_path: Path, world: World) -> None:
    """Further chat templates and nested code: one that has changed is found."""
    below = tmp_path / "additional_chat_templates" / "tool.jinja"
    below.parent.mkdir()
    for path in (below, tmp_path / "config.json", tmp_path / "README.md"):
        path.write_text("{}")
    write_sums_together(tmp_path, world)
    assert find_fault_of_export(tmp_path, world) is None
    below.write_text("[]")
    assert find_fault_of_export(tmp_path, world) == "additional_chat_templates/tool.jinja has changed"


def test_who_has_lost_the_folder_removes_no_draft_of_a_model(tmp_path: Path) -> None:
    draft = draft_of(tmp_path / "final")
    draft.mkdir()

    def lost() -> None:
        raise FolderLost("train.run_dir: not this run's any more")

    with pytest.raises(FolderLost):
        exporting._make_draft(draft, 0, lost)
    assert draft.is_dir()


def save_until_killed(run_dir: Path, number: int) -> None:
    """Saves step 2, and ends this process before it changes the run folder for the `number`-th time. Python tells an
    audit hook each file that is opened, and each one that is made, renamed or removed.
    """
    changes = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        is_change |= event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if is_change and str(run_dir) in f"{arguments[0]} {folder_of(arguments[-1])}":
            changes.append(event)
            if len(changes) == number:
                os._exit(9)

    try:
        with open_world(60) as world:
            sys.addaudithook(hook)
            os._exit(int(bool(save(run_dir, 2, world, keep=1))))
    finally:
        os._exit(1)


def folder_of(descriptor: object) -> str:
    """The folder by which shutil.rmtree calls unlink and rmdir, whose last argument is its descriptor, or -1."""
    link = Path(f"/proc/self/fd/{descriptor}")
    return str(link.readlink()) if link.is_symlink() else ""


def save_again_and_again(root: Path) -> None:
    """Saves step 2 in copies of the run folder `0`, killed at the first change in `1` and so on, to the first copy in
    which it is not killed. In a process without threads, whose forks can be used.
    """
    number, code = 0, 9
    while code == 9:
        number += 1
        run_dir = Path(shutil.copytree(root / "0", root / str(number)))
        pid = os.fork()
        if pid == 0:
            save_until_killed(run_dir, number)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.exit(code)


def test_killed_before_any_change_a_save_costs_no_checkpoint(tmp_path: Path) -> None:
    """Step 1 is replaced by step 2, before which it is not removed. The next save leaves itself alone."""
    with open_world(60) as world:
        assert save(tmp_path / "0", 1, world) == ""
    process = start(save_again_and_again, tmp_path)
    process.join()
    assert process.exitcode == 0
    run_dirs = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))[1:]
    newest = [newest_checkpoint(run_dir) for run_dir in run_dirs]
    assert None not in newest
    steps = [step_of(path) for path in newest if path]
    assert steps == sorted(steps) and steps.count(1) > 6 and steps.count(2) > 6
    forget_plans("failing")
    with open_world(60) as world:
        for run_dir in run_dirs:
            assert save(run_dir, 3, world, keep=1) == ""
            assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000003"], run_dir.name
    forget_plans("failing")


def test_files_that_nfs_cannot_remove_yet_harm_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    """A file of each removed folder is open in some process: the old checkpoint, and the draft of a run that was
    killed, are gone all the same, and their leftovers go with the first save after the file was closed.
    """
    draft = checkpoint_path(tmp_path, 2).with_suffix(".tmp")
    draft.mkdir(parents=True)
    (draft / "__0_0.distcp").write_text("half")
    with monkeypatch.context() as patch:
        hold_a_file(patch)
        assert [save(tmp_path, step, world, keep=1) for step in (1, 2)] == ["", ""]
        found = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        assert len(found) == 3 and "step-000002" in found and "step-000001" not in found
        assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)
        assert ".nfs" not in (checkpoint_path(tmp_path, 2) / "COMPLETE").read_text()
    assert save(tmp_path, 3, world, keep=1) == ""
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
