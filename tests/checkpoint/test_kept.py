"""Which checkpoints are kept: the newest good ones, never a damaged one in the place of a good one; and what is on the
disk before anything is removed."""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo.base import files
from dpo.base.errors import RunError
from dpo.checkpoint import folders, marker, verify
from dpo.checkpoint.folders import checkpoint_path, checkpoints_of, step_of
from dpo.checkpoint.marker import MARKER
from dpo.checkpoint.plans import forget_plans
from dpo.checkpoint.state import RunState
from dpo.checkpoint.store import Shelf, open_shelf, write_checkpoint
from dpo.checkpoint.verify import find_fault
from dpo.distributed.startup import open_world
from dpo.distributed.world import World
from tests.support.checkpoints import flip, newest_checkpoint, save, shelf_of, some_tensors

NOT_FINITE = "its weights are NaN or infinite"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """This process alone."""
    with open_world(60) as world:
        yield world
    forget_plans(f"plans of {tmp_path}")


def steps(run_dir: Path) -> list[int]:
    return [step_of(path) for path in checkpoints_of(run_dir)]


def damage(path: Path, how: str) -> None:
    """Three kinds: seen by the size, by the marker, and by reading alone."""
    (shard,) = path.glob("*.distcp")
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "no marker":
        (path / MARKER).unlink()
    else:
        flip(shard)


def save_infinite(shelf: Shelf, step: int) -> None:
    """Writes a checkpoint in which one weight is infinite."""
    tensors = some_tensors(step)
    tensors["model"]["weight3"][1] = float("inf")
    write_checkpoint(shelf, RunState(step, {}), tensors, lambda: None)


def later(shelf: Shelf, verified: Path | None = None) -> Shelf:
    """The shelf of a later start, which has verified one checkpoint."""
    return open_shelf(shelf.run_dir, shelf.keep, shelf.world, 60, verified)


def test_the_newest_good_ones_stay(tmp_path: Path, world: World) -> None:
    shelf = shelf_of(tmp_path, 2, world)
    found = []
    for step in (1, 2, 3, 4):
        save(shelf, step)
        found.append(steps(tmp_path))
    assert found == [[1], [1, 2], [2, 3], [3, 4]]


@pytest.mark.parametrize("how", ["cut", "no marker"])
def test_a_damaged_one_does_not_count(tmp_path: Path, world: World, how: str) -> None:
    """Step 2 is damaged after it was written: with keep 2, step 1 stays until there are two good ones beside it."""
    shelf = shelf_of(tmp_path, 2, world)
    save(shelf, 1)
    damage(save(shelf, 2), how)
    save(shelf, 3)
    assert steps(tmp_path) == [1, 2, 3]
    save(shelf, 4)
    assert steps(tmp_path) == [3, 4]


@pytest.mark.parametrize("how", ["cut", "no marker", "flipped"])
def test_the_last_good_one_stays(tmp_path: Path, world: World, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an earlier start: steps 1, 2 and 3, of which 2 and 3 are damaged. Another three are written, keep is 3."""
    shelf = shelf_of(tmp_path, 3, world)
    for step in (1, 2, 3):
        save(shelf, step)
    for step in (2, 3):
        damage(checkpoint_path(tmp_path, step), how)
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)
    shelf = later(shelf, checkpoint_path(tmp_path, 1))
    save(shelf, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    capsys.readouterr()
    save(shelf, 5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    save(shelf, 6)
    assert steps(tmp_path) == [4, 5, 6]
    assert "is damaged" not in capsys.readouterr().err  # told once, when step 4 was written


def not_counted(run_dir: Path, step: int) -> str:
    """The warning of a checkpoint whose weights are not finite."""
    return f"WARNING: checkpoint {checkpoint_path(run_dir, step)} does not count for checkpoint.keep: {NOT_FINITE}\n"


@pytest.mark.parametrize("began_finite", [True, False])
def test_weights_that_are_not_finite_take_no_good_ones_place(
    tmp_path: Path, world: World, began_finite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With keep 1: nothing can go on from step 2. It is told, unless the run has had such weights from the first."""
    shelf = replace(shelf_of(tmp_path, 1, world), began_finite=began_finite)
    save(shelf, 1)
    save_infinite(shelf, 2)
    assert (not_counted(tmp_path, 2) in capsys.readouterr().err) is began_finite
    assert steps(tmp_path) == ([1, 2] if began_finite else [2])
    assert find_fault(checkpoint_path(tmp_path, 2)) == (NOT_FINITE if began_finite else None)
    save(shelf, 3)
    assert steps(tmp_path) == [3]


@pytest.mark.parametrize("began_finite", [True, False])
def test_a_later_start_knows_whose_weights_are_not_finite(
    tmp_path: Path, world: World, began_finite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With keep 2: of an earlier start, the finite step 1 and step 2; where step 2 counts, step 1 goes."""
    shelf = replace(shelf_of(tmp_path, 2, world), began_finite=began_finite)
    save(shelf, 1)
    save_infinite(shelf, 2)
    capsys.readouterr()
    shelf = later(shelf)
    save(shelf, 3)
    assert steps(tmp_path) == ([1, 2, 3] if began_finite else [2, 3])
    assert (not_counted(tmp_path, 2) in capsys.readouterr().err) is began_finite
    save_infinite(shelf, 4)
    assert steps(tmp_path) == ([1, 2, 3, 4] if began_finite else [2, 3, 4])
    save(shelf, 5)
    assert steps(tmp_path) == [3, 4, 5]


def test_others_are_verified_before_an_older_one_goes(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 1 to 3 are of an earlier start; each is read once, and only where an older one would go."""
    shelf = shelf_of(tmp_path, None, world)
    for step in (1, 2, 3):
        save(shelf, step)
    read: list[int] = []
    find = verify.find_change_together
    monkeypatch.setattr(
        folders, "find_change_together", lambda path, *rest: (read.append(step_of(path)), find(path, *rest))[1]
    )
    shelf = Shelf(tmp_path, 3, shelf.plans, world, shelf.group)
    flip(checkpoint_path(tmp_path, 2) / "state.json")
    save(shelf, 4)
    assert (read, steps(tmp_path)) == ([3, 2], [1, 2, 3, 4])
    warning = f"WARNING: checkpoint {checkpoint_path(tmp_path, 2)} is damaged, and does not count for checkpoint.keep: "
    assert f"{warning}state.json has changed\n" in capsys.readouterr().err
    save(shelf, 5)
    assert (read, steps(tmp_path)) == ([3, 2], [3, 4, 5])


def test_an_error_of_the_moment_is_no_damage_of_a_kept_one(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 2, of an earlier start, cannot be read once: nothing is removed then, and it counts at the next save."""
    shelf = shelf_of(tmp_path, None, world)
    for step in (1, 2):
        save(shelf, step)
    shelf = Shelf(tmp_path, 2, shelf.plans, world, shelf.group)

    def stale(path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        digest = marker.sha256_of
        patch.setattr(
            marker, "sha256_of", lambda path: stale(path) if path.parent.name == "step-000002" else digest(path)
        )
        save(shelf, 3)
    assert steps(tmp_path) == [1, 2, 3]
    assert "WARNING: old checkpoints are not removed now: " in capsys.readouterr().err
    save(shelf, 4)
    assert steps(tmp_path) == [3, 4]
    assert shelf.known[checkpoint_path(tmp_path, 3).name] is not None


def test_the_metadata_of_a_kept_one_is_not_parsed(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash is compared; on many ranks its parsing takes long, and holds the training thread."""
    shelf = shelf_of(tmp_path, None, world)
    for step in (1, 2):
        save(shelf, step)
    shelf = Shelf(tmp_path, 2, shelf.plans, world, shelf.group)
    monkeypatch.setattr(verify, "read_metadata", None)
    save(shelf, 3)
    assert steps(tmp_path) == [2, 3]


def test_the_one_that_was_verified_at_the_start_is_not_read_again(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it was named: by a link."""
    shelf = shelf_of(tmp_path / "run", 2, world)
    for step in (1, 2):
        save(shelf, step)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    shelf = later(shelf, checkpoint_path(tmp_path / "link", 2))
    monkeypatch.setattr(folders, "find_change_together", None)
    save(shelf, 3)
    assert steps(tmp_path / "run") == [2, 3]
    other = later(shelf, save(shelf_of(tmp_path / "other", None, world), 1))  # another run's is none of this one
    assert other.known == {}
    forget_plans(f"plans of {tmp_path / 'run'}"), forget_plans(f"plans of {tmp_path / 'other'}")


def test_a_marker_that_cannot_be_read_when_a_run_begins_ends_all_ranks(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 alone reads it: its error must reach the others, which would go on and wait for it."""
    one = save(shelf_of(tmp_path, 2, world), 1)

    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr("dpo.checkpoint.store.marker_of", stale)
    with pytest.raises(RunError, match="Stale file handle"):
        open_shelf(tmp_path, 2, world, 60, one)


def test_a_marker_that_has_changed_is_not_the_one_that_is_known(tmp_path: Path, world: World) -> None:
    """A hash in the marker of step 2 is another one: no size tells, and it does not count."""
    shelf = shelf_of(tmp_path, 2, world)
    save(shelf, 1)
    path = save(shelf, 2) / MARKER
    entries = json.loads(path.read_text())
    entries[".metadata"][1] = entries["state.json"][1]
    path.write_text(json.dumps(entries))
    assert find_fault(path.parent) == ".metadata has changed"
    save(shelf, 3)
    assert steps(tmp_path) == [1, 2, 3]


# --- on the disk -----------------------------------------------------------------------------------------------------


class Events:
    """What is synced, renamed and removed, in order, by the names of the files."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self.done = root, list[tuple[str, str]]()
        fsync, rename, remove = os.fsync, Path.rename, files._remove

        def synced(descriptor: int) -> None:
            self.note("synced", Path(f"/proc/self/fd/{descriptor}").readlink())
            fsync(descriptor)

        def renamed(path: Path, target: Path) -> Any:
            self.note("renamed", Path(target))
            return rename(path, target)

        def removed(path: Path) -> None:
            if path.exists():
                self.note("removed", path)
            remove(path)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(Path, "rename", renamed)
        monkeypatch.setattr(files, "_remove", removed)

    def note(self, what: str, path: Path) -> None:
        self.done.append((what, str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)))


def test_all_is_on_the_disk_before_an_older_one_goes(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and the folder, then the name, then both folders above it; only then step 1 is removed."""
    shelf = shelf_of(tmp_path, 1, world)
    save(shelf, 1)
    events = Events(tmp_path, monkeypatch)
    two = save(shelf, 2)
    renamed = events.done.index(("renamed", "checkpoints/step-000002"))
    before = {name for what, name in events.done[:renamed] if what == "synced"}
    draft = "checkpoints/step-000002.tmp"
    assert {f"{draft}/{path.name}" for path in two.iterdir()} | {draft} <= before
    assert len(list(two.iterdir())) == 4
    after = [event for event in events.done[renamed + 1 :] if event[1] in ("checkpoints", ".")]
    assert after[:2] == [("synced", "checkpoints"), ("synced", ".")]
    (removed,) = [number for number, (what, _) in enumerate(events.done) if what == "removed"]
    assert events.done.index(("synced", "."), renamed) < removed


def test_a_checkpoint_in_the_place_of_another_removes_it_last(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step is saved again: the old one is under another name until the new one is on the disk."""
    shelf = shelf_of(tmp_path, 1, world)
    save(shelf, 1)
    events = Events(tmp_path, monkeypatch)
    save(shelf, 1)
    renamed = events.done.index(("renamed", "checkpoints/step-000001"))
    (removed,) = [number for number, (what, _) in enumerate(events.done) if what == "removed"]
    assert events.done.index(("synced", "checkpoints"), renamed) < removed
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


# --- links -----------------------------------------------------------------------------------------------------------


def test_an_old_one_that_is_a_link_is_removed_as_a_link(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moved to another disk: its files stay there, which is told; no commit fails for it."""
    shelf = shelf_of(tmp_path, 1, world)
    one = save(shelf, 1)
    one.rename(tmp_path / "elsewhere")
    one.symlink_to(tmp_path / "elsewhere")
    assert newest_checkpoint(tmp_path) == one
    capsys.readouterr()
    save(shelf, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert (
        f"{one} is a link: the link is removed, its files stay in {tmp_path / 'elsewhere'}" in capsys.readouterr().err
    )
    assert len(list((tmp_path / "elsewhere").iterdir())) == 4


def test_an_old_one_that_cannot_be_removed_fails_no_commit(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stale(folder: Path) -> None:
        raise OSError(116, "Stale file handle")

    shelf = shelf_of(tmp_path, 1, world)
    save(shelf, 1)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "remove_checkpoint", stale)
        save(shelf, 2)
    assert "WARNING: an old checkpoint cannot be removed: " in capsys.readouterr().err
    save(shelf, 3)
    assert steps(tmp_path) == [3]
