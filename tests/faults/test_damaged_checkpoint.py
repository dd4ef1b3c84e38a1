"""Files of a checkpoint that are not as they were written: it is passed over, and the one before it is used."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from dpo.base.errors import UserError
from dpo.checkpoint.folders import checkpoint_path, newer_checkpoints, newest_checkpoint
from dpo.checkpoint.store import read_state


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
        case "a lost .metadata":
            (folder / ".metadata").unlink()
        case "another step in state.json":
            state = json.loads((folder / "state.json").read_text())
            (folder / "state.json").write_text(json.dumps(state | {"step": 5}))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    "no marker",
    "half a marker",
    "a marker of nonsense",
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
    assert newest_checkpoint(tmp_path / "run") == older
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


def test_a_state_file_holds_step_and_identity(dead_run: Path) -> None:
    state = read_state(checkpoint_path(dead_run, 4), "checkpoint.resume")
    assert state.step == 4
    assert dataclasses.asdict(state).keys() == {"step", "identity"}
    assert state.identity["loss.beta"] == 0.1
