"""Files of a checkpoint that are not as they were written: it is passed over, and the one before it is used."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from dpo.base.errors import UserError
from dpo.checkpoint import marker, verify
from dpo.checkpoint.folders import checkpoint_path, newer_checkpoints
from dpo.checkpoint.plans import forget_plans
from dpo.checkpoint.state import RunState, read_state
from dpo.checkpoint.store import write_checkpoint
from dpo.checkpoint.verify import find_fault, find_fault_together, first_usable
from dpo.config import Config
from dpo.distributed.startup import open_world
from dpo.replay import program as replay
from tests.support.checkpoints import flip, newest_checkpoint, remark, save, shelf_of
from tests.support.ranks import Ranks
from tests.support.runs import (
    changed,
    error_lines,
    exit_code,
    exit_code_of,
    find_start,
    run,
    same_weights,
    six_steps,
    snapshot,
)

NOT_FINITE = "its weights are NaN or infinite"


@pytest.fixture
def dead_run(dead_root: Path) -> Path:
    """A run folder with checkpoints of steps 2 and 4, its last; to be copied."""
    return dead_root / "dead"


def damage(folder: Path, how: str) -> None:
    """One of the things that happen to files."""
    (shard,) = folder.glob("*.distcp")
    match how:
        case "no marker":
            (folder / "COMPLETE").unlink()
        case "half a marker":
            marker = folder / "COMPLETE"
            marker.write_text(marker.read_text()[:40])
        case "a marker of nonsense":
            (folder / "COMPLETE").write_text("[1, 2]")
        case "a truncated shard":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "a lost shard":
            shard.unlink()
        case "a flipped bit in a shard":
            flip(shard)
        case "a flipped bit in .metadata":
            flip(folder / ".metadata")
        case "an empty marker":
            (folder / "COMPLETE").write_text("{}")
        case "a marker of a part":
            entries = json.loads((folder / "COMPLETE").read_text())
            del entries[shard.name]
            (folder / "COMPLETE").write_text(json.dumps(entries))
        case "a link that leads nowhere":
            shutil.rmtree(folder)
            folder.symlink_to(folder.parent / "of a disk that is not mounted")
        case "a lost .metadata":
            (folder / ".metadata").unlink()
        case "another step in state.json":
            state = json.loads((folder / "state.json").read_text())
            (folder / "state.json").write_text(json.dumps(state | {"step": 5}))


DAMAGES = [
    "no marker",
    "half a marker",
    "a marker of nonsense",
    "an empty marker",
    "a marker of a part",
    "a link that leads nowhere",
    "a truncated shard",
    "a lost shard",
    "a flipped bit in a shard",
    "a flipped bit in .metadata",
    "a lost .metadata",
    "another step in state.json",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    dead_run: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The older one is used, with a line that says why; asked for by name, the damaged one is a user's error."""
    shutil.copytree(dead_run, tmp_path / "run")
    newest, older = (checkpoint_path(tmp_path / "run", step) for step in (4, 2))
    assert newest_checkpoint(tmp_path / "run") == newest
    damage(newest, how)
    capsys.readouterr()
    with open_world(60) as world:
        used, faults = first_usable([newest, older], world)
    assert used == older and faults.keys() == {newest}
    assert f"checkpoint {newest} is skipped: " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"checkpoint\.resume: .*step-000004: .*; valid: "):
        read_state(newest, "checkpoint.resume")


def test_only_folders_with_the_right_name_are_checkpoints(dead_run: Path, tmp_path: Path) -> None:
    """A draft that a crash left, a copy of somebody's, a stray file: none is taken, however complete it is."""
    shutil.copytree(dead_run, tmp_path / "run")
    four = checkpoint_path(tmp_path / "run", 4)
    for name in ("step-000008.tmp", "step-000009.old", "step-000007-copy", "best"):
        shutil.copytree(four, four.parent / name)
    (four.parent / "step-000010").write_text("not even a folder")
    assert newest_checkpoint(tmp_path / "run") == four
    assert newer_checkpoints(tmp_path / "run", 2) == [four]


def test_the_newest_is_the_greatest_number(dead_run: Path, tmp_path: Path) -> None:
    """Step 1000000 has seven digits; as text it stands before step-999999."""
    shutil.copytree(dead_run, tmp_path / "run")
    almost, million = (checkpoint_path(tmp_path / "run", step) for step in (999_999, 10**6))
    for path in (almost, million):
        shutil.copytree(checkpoint_path(tmp_path / "run", 4), path)
    assert newest_checkpoint(tmp_path / "run") == million
    assert newer_checkpoints(tmp_path / "run", 4) == [almost, million]


def test_what_a_state_file_holds(dead_run: Path) -> None:
    state = read_state(checkpoint_path(dead_run, 4), "checkpoint.resume")
    assert state.step == 4
    assert dataclasses.asdict(state).keys() == {"step", "identity", "skipped", "weights", "finite"}
    assert state.finite is True
    assert state.identity["loss.beta"] == 0.1


# --- a run whose checkpoints are damaged -----------------------------------------------------------------------------


@pytest.fixture
def dead(dead_root: Path, tmp_path: Path) -> Config:
    """The dead run, copied: metrics up to step 5, checkpoints of 2 and 4."""
    shutil.copytree(dead_root / "dead", tmp_path / "run")
    return six_steps(dead_root, tmp_path / "run")


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(
    dead: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that names each and the ways on; nothing is moved or written. Each of the ways works."""
    two, four = (checkpoint_path(tmp_path / "run", step) for step in (2, 4))
    before = Path(shutil.copytree(two, tmp_path / "two"))
    damage(two, "a flipped bit in a shard")
    damage(four, "no marker")
    files = snapshot(tmp_path / "run")
    named = changed(dead, train__run_dir=str(tmp_path / "new"), checkpoint__resume=str(tmp_path / "run"))
    anew = f"to begin anew, move {four.parent} away, or set another train.run_dir"
    for config, way_on in ((dead, anew), (named, "a folder RUN/checkpoints/step-000100")):
        capsys.readouterr()
        assert exit_code(config) == 2
        (error,) = error_lines(capsys.readouterr().err)
        assert error == (
            f"error: CONFIG: checkpoint.resume: none of the 2 checkpoints in {four.parent} can be used: "
            "step-000004: it is not complete: no COMPLETE; step-000002: __0_0.distcp has changed; valid: one that is "
            f"restored; or {way_on}"
        )
    assert snapshot(tmp_path / "run") == files
    shutil.rmtree(two)
    before.rename(two)
    assert find_start(dead).checkpoint == two
    two.parent.rename(tmp_path / "away")
    assert find_start(dead).checkpoint is None


def test_the_only_checkpoint_is_damaged(dead: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(checkpoint_path(tmp_path / "run", 2))
    damage(checkpoint_path(tmp_path / "run", 4), "a truncated shard")
    assert exit_code(dead) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert f"{checkpoint_path(tmp_path / 'run', 4)}: __0_0.distcp has changed: " in error
    assert error.endswith("or set another train.run_dir")


def test_checkpoints_that_changed_places_are_told(
    dead: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file is as it was written, but a run finds its newest checkpoint by the names. A copy may have any name."""
    two, four = (checkpoint_path(tmp_path / "run", step) for step in (2, 4))
    two.rename(tmp_path / "spare"), four.rename(two), (tmp_path / "spare").rename(four)
    files = snapshot(tmp_path / "run")
    assert exit_code(dead) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert f": checkpoint.resume: {four} is a checkpoint of step 2; valid: each under the name of its own step" in error
    assert exit_code_of(replay.main, "dpo.replay", str(tmp_path / "run"), "--step", "3") == 2
    assert f": {two} is a checkpoint of step 4; " in error_lines(capsys.readouterr().err)[0]
    assert snapshot(tmp_path / "run") == files
    two.rename(tmp_path / "best")
    assert read_state(tmp_path / "best", "").step == 4


def test_drafts_are_no_checkpoints(dead: Config, tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint was complete begins anew, as before."""
    for step in (2, 4):
        folder = checkpoint_path(tmp_path / "run", step)
        folder.rename(folder.with_suffix(".tmp"))
    assert find_start(dead).checkpoint is None


def test_a_damaged_newer_one_is_put_aside_and_not_overwritten(
    dead: Config, dead_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be mended yet. The run goes on from the older one, and is the run that nobody disturbed."""
    four = checkpoint_path(tmp_path / "run", 4)
    damage(four, "a flipped bit in a shard")
    shard = (four / "__0_0.distcp").read_bytes()
    run(dead)
    told = capsys.readouterr().err
    assert f"checkpoint {four} is skipped: __0_0.distcp has changed" in told
    assert f"resumes from {checkpoint_path(tmp_path / 'run', 2)}" in told
    assert (four.with_name("step-000004.old") / "__0_0.distcp").read_bytes() == shard
    assert newest_checkpoint(tmp_path / "run") == checkpoint_path(tmp_path / "run", 6)
    assert same_weights(tmp_path / "run" / "final", run(six_steps(dead_root, tmp_path / "whole")) / "final")


# --- whose weights are not finite ------------------------------------------------------------------------------------


def record(folder: Path, **facts: object) -> None:
    """Writes facts into the state of a checkpoint, and the marker that matches."""
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | facts))
    remark(folder)


def test_bad_weights_are_passed_over_like_a_damaged_checkpoint(
    dead: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In each start; where it is asked for by name, or no other is left, it is a user's error."""
    two, four = (checkpoint_path(tmp_path / "run", step) for step in (2, 4))
    record(four, finite=False)
    assert find_start(dead).checkpoint == two
    assert f"checkpoint {four} is skipped: {NOT_FINITE}\n" in capsys.readouterr().err
    named = changed(dead, train__run_dir=str(tmp_path / "new"), checkpoint__resume=str(four))
    assert exit_code(named) == 2
    assert f"checkpoint.resume: {four}: {NOT_FINITE}; valid: " in error_lines(capsys.readouterr().err)[0]
    record(two, finite=False)
    assert exit_code(dead) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert f"can be used: step-000004: {NOT_FINITE}; step-000002: {NOT_FINITE}; valid: " in error


def test_a_checkpoint_that_does_not_tell_counts_as_finite(dead: Config, tmp_path: Path) -> None:
    """Older versions did not record it."""
    four = checkpoint_path(tmp_path / "run", 4)
    state = json.loads((four / "state.json").read_text())
    state.pop("finite", None)
    (four / "state.json").write_text(json.dumps(state))
    remark(four)
    assert find_start(dead).checkpoint == four


def save_and_look(run_dir: Path) -> tuple[Path | None, list[str]]:
    """On each rank: the first that can be used of two checkpoints, and why others cannot. In the newer one a weight of
    rank 1 alone is NaN.
    """
    with open_world(60) as world:
        shelf = shelf_of(run_dir, None, world)
        older = save(shelf, 1)
        tensors = {"model": {f"weight{world.rank}": torch.full((3,), float("nan") if world.rank else 1.0)}}
        write_checkpoint(shelf, RunState(2, {}), tensors, lambda: None)
        found, faults = first_usable([checkpoint_path(run_dir, 2), older], world)
        forget_plans(shelf.plans)
    return found, list(faults.values())


@pytest.mark.xdist_group("ranks")
def test_all_ranks_pass_bad_weights_over(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, save_and_look, tmp_path) == [(checkpoint_path(tmp_path, 1), [NOT_FINITE])] * 2


# --- checked by all ranks --------------------------------------------------------------------------------------------


def check_together(run_dir: Path) -> tuple[list[str], list[tuple[str | None, bool]]]:
    """On each rank: the files that it read of a checkpoint that all ranks wrote; what is found, and whether that is
    what one process finds alone: whole, then after one damage more in each round.
    """
    read: list[str] = []
    digest = marker.sha256_of

    def noted(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    with open_world(60) as world:
        shelf = shelf_of(run_dir, None, world)
        folder = save(shelf, 1)
        with patch.object(marker, "sha256_of", noted):
            found = [find_fault_together(folder, world)]
        same = [found[0] == find_fault(folder)]
        for name in ("__1_0.distcp", "__0_0.distcp", ".metadata"):
            dist.barrier()
            if world.is_main:
                flip(folder / name)
            found.append(find_fault_together(folder, world))
            same.append(find_fault(folder) is not None)
        forget_plans(shelf.plans)
    return read, list(zip(found, same, strict=True))


@pytest.mark.xdist_group("ranks")
def test_each_rank_reads_a_part_and_all_agree(ranks: Ranks, tmp_path: Path) -> None:
    (read0, found0), (read1, found1) = ranks(2, check_together, tmp_path)
    assert sorted(read0) == [".metadata", "__0_0.distcp", "state.json"] and read1 == ["__1_0.distcp"]
    assert found0 == found1
    faults = [fault for fault, _ in found0]
    assert faults[:2] == [None, "__1_0.distcp has changed"]
    assert faults[2:] == ["__0_0.distcp has changed", ".metadata has changed"]
    assert all(is_same for _, is_same in found0)


def test_a_check_that_takes_long_is_told(
    dead: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "TOLD_SECONDS", -1.0)
    find_start(dead)
    four = checkpoint_path(tmp_path / "run", 4)
    assert re.search(
        rf"checkpoint {four}: \d+\.\d KiB compared with their hashes in [\d.]+ m?s", capsys.readouterr().err
    )


def test_a_start_reads_each_file_once(dead: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashed once, and only of the checkpoint that is used; the resumed run does not hash it again for `keep`."""
    read: list[Path] = []
    digest = marker.sha256_of

    def noted(path: Path) -> str:
        read.append(path)
        return digest(path)

    monkeypatch.setattr(marker, "sha256_of", noted)
    run(changed(dead, checkpoint__keep=2))
    four = checkpoint_path(tmp_path / "run", 4)
    assert sorted(path.name for path in read if path.parent == four) == [".metadata", "__0_0.distcp", "state.json"]
    assert not [path for path in read if path.parent == checkpoint_path(tmp_path / "run", 2)]
