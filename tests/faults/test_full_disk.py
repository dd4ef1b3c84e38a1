"""A disk that is too small, or fills while a run is on it: told before step 1, or before a file is half-written.

The runs are on a tmpfs of a few MiB. The model has 2 million weights: a checkpoint (weights and RMSprop's squares in
float32) is 16.2 MiB, the exported model 8.1 MiB, and as much again while it is joined from its shards.
"""

import contextlib
import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from dpo.base import space
from dpo.base.errors import RunError
from dpo.base.space import Shortage
from dpo.board.writer import MetricsWriter
from dpo.checkpoint import export as exporting
from dpo.checkpoint import saver as saving
from dpo.checkpoint import store
from dpo.checkpoint.plans import forget_plans
from dpo.checkpoint.state import RunState
from dpo.checkpoint.store import Shelf, write_checkpoint
from dpo.command.exits import line_of
from dpo.config import Config, to_yaml
from dpo.disk import storage
from dpo.disk.sizes import BYTES_PER_STEP
from dpo.distributed.program import run_program
from dpo.distributed.startup import open_world
from dpo.ref_logps import cache
from dpo.run_folder import evaluations
from dpo.train import loop
from dpo.train import program as train
from tests.support.checkpoints import newest_checkpoint
from tests.support.disks import small_disk
from tests.support.ranks import Ranks
from tests.support.runs import changed, error_lines, exit_code, run, save_six_steps, six_steps, train_lines

pytestmark = pytest.mark.xdist_group("ranks")

MIB = 2**20
CHECKPOINT = 2_126_016 * 8
EVALUATION = 2 * 36
"""Bytes: of each weight and its optimizer state, of each pair."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with 2,126,016 weights, pairs.jsonl, eval.jsonl."""
    folder = save_six_steps(tmp_path_factory.mktemp("full"))
    large = LlamaConfig(vocab_size=16_384, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    LlamaForCausalLM(large).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """60 MiB: three checkpoints, or two and the export."""
    with small_disk(tmp_path / "disk", 60 * MIB) as folder:
        yield folder


def make(root: Path, disk: Path, **changes: Any) -> Config:
    """Six steps, a checkpoint after 2, 4 and 6, of which one is kept."""
    return six_steps(root, disk / "run", **({"checkpoint__keep": 1, "train__eval_every": None} | changes))


def without_fallocate() -> Any:
    """A file system such as an NFS before 4.2."""

    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    return patch.object(space, "_fallocate", unsupported)


def free(folder: Path) -> int:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def take(folder: Path, num_bytes: int) -> None:
    """Another program's file."""
    with (folder / "other").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)


# --- before step 1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [2, None])
def test_a_run_that_will_not_fit_is_one_line_before_step_1(root: Path, disk: Path, keep: int | None) -> None:
    """Three checkpoints of 16.2 MiB, two of them kept or all three, and the export's 16.2 MiB: on 30 of 60 MiB, where
    one of them and the export do not fit either.
    """
    take(disk, 30 * MIB)
    (disk.parent / "run.yaml").write_text(to_yaml(make(root, disk, checkpoint__keep=keep)))
    command = [sys.executable, "-m", "dpo.train", "--config", str(disk.parent / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (error,) = error_lines(done.stderr)
    parts = {
        2: "48.7 MiB in {}, 2 checkpoints of 16.2 MiB (checkpoint.keep 2), 12.1 KiB for metrics and the values of "
        "evaluated pairs and 16.2 MiB for a further one, written before the oldest is removed",
        None: "64.9 MiB in {}, 3 checkpoints of 16.2 MiB (checkpoint.keep null, which keeps all), 12.1 KiB for "
        "metrics and the values of evaluated pairs and 16.2 MiB for the export, twice the exported model",
    }
    needed = f"the run needs {parts[keep].format(disk / 'run')}; 30.0 MiB are free there, and "
    assert f"train.run_dir: the disk is full: {needed}" in error
    assert "and one checkpoint and the export, twice the exported model, take 32.4 MiB; valid: " in error
    assert error.endswith("valid: a folder with more room")
    assert [path.name for path in disk.iterdir()] == ["other"]


def test_a_run_that_fits_exactly_trains(root: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two checkpoints for a while: 34 MiB with what torch and the metrics add, of 35."""
    take(disk, 25 * MIB)
    assert len(train_lines(run(make(root, disk)))) == 6
    assert "WARNING: train.run_dir" not in capsys.readouterr().err


def test_a_run_that_fits_in_part_is_warned(root: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On 40 MiB one checkpoint and the export fit, the kept two and a third do not: told before step 1. The third is
    the last, so the run has no model.
    """
    take(disk, 20 * MIB)
    assert exit_code(make(root, disk, checkpoint__keep=2)) == 1
    lines = capsys.readouterr().err.splitlines()
    (warning,) = [line for line in lines if line.startswith("WARNING: train.run_dir: the run needs 48.7 MiB in ")]
    assert "; 40.0 MiB are free there: the disk will be full before the run ends; " in warning
    assert lines.index(warning) < next(number for number, line in enumerate(lines) if line.startswith("step 1/6"))
    assert len(train_lines(disk / "run")) == 6


@pytest.mark.parametrize(("quota", "code", "end"), [(30, 2, ", and one"), (40, 0, ": the quota will be used up ")])
def test_a_quota_is_treated_like_a_disk(
    root: Path, disk: Path, quota: int, code: int, end: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One checkpoint and the export take 32.4 MiB, the whole run 48.7: a smaller quota is an error, a larger one a
    warning. Only a reservation knows this one; the writes of the run are under none.
    """

    def over_quota(descriptor: int, num_bytes: int) -> None:
        if num_bytes > quota * MIB:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(space, "_fallocate", over_quota)
    assert exit_code(make(root, disk, checkpoint__keep=2)) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the run needs 48.7" in line]
    assert f"60.0 MiB are free there, but a quota of the user, the group or the folder allows less{end}" in line
    assert line.startswith("WARNING: " if code == 0 else "error: ")


def test_values_of_pairs_that_do_not_fit_end_nothing(
    root: Path, disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning for each of the three evaluations."""

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(evaluations, "write_atomically", full)
    assert exit_code(make(root, disk, train__eval_every=3)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING: ")]
    told = [line.partition(" for the report: ")[0] for line in lines if "the disk is full" in line]
    assert told == [f"WARNING: step {step}: the values of single pairs are not kept" for step in (0, 3, 6)]


@pytest.mark.parametrize("room, code", [(30, 2), (50, 0)])
def test_without_fallocate_the_free_space_decides(
    root: Path, disk: Path, capsys: pytest.CaptureFixture[str], room: int, code: int
) -> None:
    take(disk, (60 - room) * MIB)
    with without_fallocate():
        assert exit_code(make(root, disk, checkpoint__keep=2)) == code
    assert len(error_lines(capsys.readouterr().err)) == (code == 2)


def needed_bytes(config: Config) -> int:
    """What a start asks of its disk."""
    asked: list[int] = []
    find = space.find_shortage

    def look(folder: Path, num_bytes: int) -> Any:
        asked.append(num_bytes)
        return find(folder, num_bytes)

    with patch.object(storage, "find_shortage", look):
        run(config)
    return asked[0]


def test_a_start_asks_for_what_is_left_to_write(root: Path, disk: Path) -> None:
    """At first two checkpoints and evaluations; after step 4 one; after step 6, without a model, its export alone. A
    draft that a killed run left, and that will be removed, counts as free.
    """
    config = make(root, disk, train__steps=4)
    assert needed_bytes(config) == 2 * CHECKPOINT + 2 * EVALUATION + 4 * BYTES_PER_STEP
    more = changed(config, train__steps=6)
    draft = disk / "run" / "checkpoints" / "step-000006.tmp"
    draft.mkdir()
    (draft / "__0_0.distcp").write_bytes(bytes(MIB))
    assert needed_bytes(more) == CHECKPOINT + EVALUATION + 2 * BYTES_PER_STEP - MIB
    (disk / "run" / "final").rename(disk / "run" / "elsewhere")
    assert needed_bytes(more) == CHECKPOINT  # half a checkpoint, and as much again for the shards


@pytest.mark.parametrize(("room", "code"), [(10, 2), (20, 0), (50, 0)])
def test_checkpoints_on_a_disk_of_their_own(
    root: Path, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], room: int, code: int
) -> None:
    """`checkpoints/` is a link to it; one of them is kept, and another one there while it is replaced: 32.4 MiB. The
    last of three then does not fit on 20 MiB, which is told before the first.
    """
    (tmp_path / "run").mkdir()
    (disk / "saved").mkdir()
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.symlink_to(disk / "saved")
    take(disk, free(disk) - room * MIB)
    assert exit_code(make(root, tmp_path)) == (1 if room == 20 else code)
    lines = [line for line in capsys.readouterr().err.splitlines() if "the run needs" in line]
    if room == 50:
        assert lines == []
        return
    (line,) = lines
    assert (
        f"the run needs 32.4 MiB in {checkpoints}, 1 checkpoint of 16.2 MiB (checkpoint.keep 1) and a further " in line
    )
    assert ("and one checkpoint takes 16.2 MiB; valid: " in line) == (room == 10)
    assert line.startswith("error: " if room == 10 else "WARNING: ")


@pytest.mark.parametrize("is_same", [True, False])
def test_the_cache_leaves_room_for_the_run(
    root: Path, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    is_same: bool,
) -> None:  # fmt: skip
    """40 rows of 24 bytes; on the disk of the run folder a checkpoint and the export must fit beside them."""
    monkeypatch.setattr(cache, "find_shortage", lambda folder, num: Shortage(folder, num, 1000, is_quota=False))
    folder = disk / "cache" if is_same else tmp_path / "cache"
    assert exit_code(make(root, disk, reference__cache_dir=str(folder))) == 2
    (error,) = error_lines(capsys.readouterr().err)
    both = "40 rows, with 32.4 MiB that the run needs on this disk, of 32.4 MiB does not fit in "
    assert f"a cache of {both if is_same else '40 rows of 0.9 KiB does not fit in '}{folder}/" in error


def test_a_draft_that_will_be_removed_makes_no_room_for_the_cache(
    root: Path, disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are written before it goes, however large it is: 40 MiB, of which the run needs 32.4 MiB again."""
    monkeypatch.setattr(cache, "find_shortage", lambda folder, num: Shortage(folder, num, 1000, is_quota=False))
    draft = disk / "run" / "checkpoints" / "step-000002.tmp"
    draft.mkdir(parents=True)
    with (draft / "__0_0.distcp").open("wb") as file:
        file.truncate(40 * MIB)
    assert exit_code(make(root, disk, reference__cache_dir=str(disk / "cache"))) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert "a cache of 40 rows of 0.9 KiB does not fit in " in error


# --- later -----------------------------------------------------------------------------------------------------------


def train_while_it_fills(config: Config, fault: str) -> tuple[int, str, int]:
    """A rank of a run; when its second checkpoint begins, another program takes all but 10 MiB of the disk: (exit code,
    stderr, steps).
    """
    write, checkpoints, step, steps = saving.write_checkpoint, [], loop._step, []

    def filling(shelf: Any, *others: Any) -> None:
        checkpoints.append(1)
        if len(checkpoints) == 2 and shelf.world.is_main:
            take(shelf.run_dir.parent, free(shelf.run_dir) - 10 * MIB)
        write(shelf, *others)

    def counted(*args: Any) -> Any:
        steps.append(1)
        return step(*args)

    stderr = io.StringIO()
    with (
        FAULTS[fault](),
        patch.object(saving, "write_checkpoint", filling),
        patch.object(loop, "_step", counted),
        contextlib.redirect_stderr(stderr),
    ):
        code = run_program(lambda: train.run_training(config))
    return code, stderr.getvalue(), len(steps)


FAULTS = {"fallocate": contextlib.nullcontext, "disk_usage": without_fallocate}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_fills_is_told_before_files_are_half_written(
    root: Path, disk: Path, ranks: Ranks, fault: str
) -> None:
    """The checkpoint of step 2 stays; those of steps 4 and 6 do not fit, which ends the run."""
    (code, said, steps), (other_code, other_said, _) = ranks(2, train_while_it_fills, make(root, disk), fault)
    assert (code, other_code, steps, error_lines(other_said)) == (1, 1, 6, [])
    (error,) = error_lines(said)
    checkpoints = disk / "run" / "checkpoints"
    assert error == (
        f"error: the disk is full: a checkpoint of 16.2 MiB does not fit in {checkpoints}: 10.0 MiB are free there"
    )
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    assert newest_checkpoint(disk / "run") == checkpoints / "step-000002"
    assert not (disk / "run" / "final").exists()
    (disk / "other").unlink()
    assert [line["step"] for line in train_lines(run(make(root, disk)))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("num_bytes", [16 * MIB, 4 * MIB, 2 * MIB + 1000, 1000, 8])
def test_a_shortage_that_is_met_in_the_middle_of_a_file_is_told_as_one(
    disk: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    """No one knew of it before: torch's own errors are `unexpected pos` and `file write failed`. The next checkpoint is
    written, and half a one does not take its room.
    """
    monkeypatch.setattr(store, "find_shortage", lambda *_: None)
    take(disk, free(disk) - num_bytes)
    with open_world(60) as world:
        assert dist.group.WORLD is not None
        shelf = Shelf(disk, None, "full", world, dist.group.WORLD)
        tensors = {"model": {"weight": torch.zeros(CHECKPOINT // 4)}}
        before = free(disk)
        with pytest.raises(
            RunError, match=r"^the disk is full.*: rank 0 cannot write .*step-000001\.tmp, 16.2 MiB in all: "
        ):
            write_checkpoint(shelf, RunState(1, {}), tensors, lambda: None)
        assert free(disk) >= before - 4 * 4096  # of folders
        (disk / "other").unlink()
        write_checkpoint(shelf, RunState(2, {}), tensors, lambda: None)
    assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step-000002"]
    forget_plans("full")


@pytest.mark.parametrize("seen", [True, False])
def test_a_model_that_does_not_fit(
    root: Path, disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    """All steps are saved; once there is room again, the next start exports alone."""
    config = make(root, disk)
    export, find = exporting._make_draft, exporting.find_shortage

    def filling(*args: Any) -> None:
        take(disk, free(disk) - 6 * MIB)
        export(*args)

    monkeypatch.setattr(exporting, "_make_draft", filling)
    monkeypatch.setattr(exporting, "find_shortage", find if seen else lambda *_: None)
    assert exit_code(config) == 1
    (error,) = error_lines(capsys.readouterr().err)
    expected = f"does not fit in {disk / 'run'}: 6.0 MiB are free there" if seen else "cannot write "
    assert error.startswith("error: the disk is full: ") and expected in error
    monkeypatch.undo()
    (disk / "other").unlink()
    run(config)
    assert (disk / "run" / "final" / "model.safetensors").is_file()
    assert [path.name for path in (disk / "run").glob(".final*")] == []


def test_metrics_name_their_file_and_size(tmp_path: Path) -> None:
    """/dev/full takes no byte, neither of a line nor, of the same line again, when the file is closed."""
    writer = MetricsWriter(tmp_path, [])
    writer.file.close()
    writer.file = Path("/dev/full").open("a", encoding="utf-8")
    line = {"train/loss": 0.5, "train/words": "x" * 2000}
    for write, needed in ((lambda: writer.write(1, line), "2.0 KiB"), (writer.close, "at least 1 byte")):
        with pytest.raises(OSError) as raised:
            write()
        assert line_of(raised.value).startswith(f"the disk is full: cannot write {tmp_path}/metrics.jsonl, {needed}: ")


def test_a_cache_that_does_not_fit_is_told_before_the_reference_is_computed(
    root: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 rows that are missing, and 20 of the table: 960 bytes."""
    take(disk, free(disk))
    config = make(root, disk.parent, reference__cache_dir=str(disk / "cache"))
    assert exit_code(config) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert "reference.cache_dir: the disk is full: a cache of 40 rows of 0.9 KiB does not fit in " in error
