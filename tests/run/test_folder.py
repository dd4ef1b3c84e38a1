"""What lies in a run folder decides how a start begins: fresh, where a checkpoint ends, or not at all."""

import errno
import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from dpo.base.errors import RunError, UserError
from dpo.base.sums import sha256_of
from dpo.board.writer import MetricsWriter
from dpo.checkpoint.folders import checkpoint_path
from dpo.config import Config, load_config
from dpo.run.folder import _put_aside, find_candidates
from dpo.run_folder.evaluations import evaluation_steps
from dpo.run_folder.files import read_metrics
from tests.support.checkpoints import flip
from tests.support.runs import (
    changed,
    error_lines,
    eval_lines,
    exit_code,
    find_start,
    run,
    run_until,
    same_weights,
    save_six_steps,
    six_steps,
    snapshot,
    train_lines,
)

pytestmark = pytest.mark.xdist_group("run-folder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl, eval.jsonl, and done/ with dead/: a finished run and one that died before step 6."""
    root = tmp_path_factory.mktemp("run-folder")
    save_six_steps(root)
    run(six_steps(root, root / "done"))
    run_until(six_steps(root, root / "dead"), 6)
    return root


@pytest.fixture(scope="module")
def eight(folders: Path) -> Path:
    """A run of eight steps instead of six."""
    return run(six_steps(folders, folders / "eight", train__steps=8))


@pytest.fixture
def dead(folders: Path, tmp_path: Path) -> Config:
    """The dead run, copied: metrics up to step 5, checkpoints of 2 and 4."""
    shutil.copytree(folders / "dead", tmp_path / "run")
    return six_steps(folders, tmp_path / "run")


@pytest.fixture
def done(folders: Path, tmp_path: Path) -> Config:
    """The finished run, copied."""
    shutil.copytree(folders / "done", tmp_path / "run")
    return six_steps(folders, tmp_path / "run")


def steps(run_dir: Path) -> list[float]:
    return [line["step"] for line in train_lines(run_dir)]


# --- fresh -----------------------------------------------------------------------------------------------------------


def test_what_lies_in_a_run_folder(folders: Path) -> None:
    """The names of the contract, where the code came from, and nothing else; config.yaml says the same when it is read
    again."""
    names = {path.name for path in (folders / "done").iterdir()}
    assert names == {
        "config.yaml",
        "provenance.json",
        "log.txt",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "eval",
        "final",
        "report.html",
    }
    written = load_config(["--config", str(folders / "done" / "config.yaml")], "dpo.train")
    decided = {"parallel__activation_checkpointing": "none", "parallel__sync_gradients": "every_micro_batch"}
    assert written == changed(six_steps(folders, folders / "done"), **decided)
    assert list((folders / "done" / "tensorboard").glob("events.out.tfevents.*"))
    assert steps(folders / "done") == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in eval_lines(folders / "done")] == [0, 3, 6]
    assert [line["step"] for line in read_metrics(folders / "done") if "reference/seconds" in line] == [0]
    assert evaluation_steps(folders / "done") == [0, 3, 6]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_empty_folder_is_a_fresh_start(folders: Path, tmp_path: Path, resume: str) -> None:
    (tmp_path / "run").mkdir()
    run(six_steps(folders, tmp_path / "run", train__steps=1, checkpoint__resume=resume))
    assert steps(tmp_path / "run") == [1]


def test_a_folder_that_is_removed_while_it_is_looked_at_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another start that ends: the folder was there, and had no file of a run."""

    def gone(path: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Path, "iterdir", gone)
    assert find_candidates(six_steps(tmp_path, tmp_path / "run", checkpoint__resume="never")) == []


def test_never_in_a_used_folder_is_refused(done: Config, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(Path(str(done.train.run_dir)))
    assert exit_code(changed(done, checkpoint__resume="never")) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert error.startswith(f"error: CONFIG: train.run_dir: {done.train.run_dir} is not empty; valid: ")
    assert snapshot(Path(str(done.train.run_dir))) == before


def test_files_without_a_checkpoint_are_put_aside(folders: Path, tmp_path: Path) -> None:
    """Three deaths before the first checkpoint: metrics.jsonl.old, .old-1, .old-2, and each step once in the fourth."""
    config = six_steps(folders, tmp_path / "run", checkpoint__save_every=None)
    for step in (2, 3, 4):
        run_until(config, step)
    (tmp_path / "run" / "report.html").write_text("of the third start")
    run(config)
    assert (tmp_path / "run" / "report.html.old").read_text() == "of the third start"
    found = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "run").glob("metrics.jsonl*")}
    # A line of the reference, of the first step's check, of the evaluation at 0, a line a step, from the fourth on
    # those at 3 and 6.
    assert found == {"metrics.jsonl.old": 4, "metrics.jsonl.old-1": 5, "metrics.jsonl.old-2": 7, "metrics.jsonl": 11}
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert len(list((tmp_path / "run").glob("tensorboard*"))) == len(list((tmp_path / "run").glob("eval*"))) == 4
    assert same_weights(folders / "done" / "final", tmp_path / "run" / "final")


def test_somebody_elses_files_stay(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run(six_steps(folders, tmp_path / "run", train__steps=1))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


# --- on the disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_run_folder_that_cannot_be_is_found_before_any_work(
    folders: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    config = six_steps(folders, tmp_path / name, reference__cache_dir=str(tmp_path / "cache"))
    assert exit_code(config) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert error.startswith(f"error: CONFIG: train.run_dir: {tmp_path / name}: {tmp_path / 'file'} is a file; valid: ")
    assert not (tmp_path / "cache").exists()


def test_a_run_folder_without_permission(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The permission is taken away by hand: root, who may run this test, has all of them."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert exit_code(six_steps(folders, tmp_path / "run")) == 2
    assert (
        f"train.run_dir: {tmp_path / 'run'}: cannot write to {tmp_path}; valid: "
        in error_lines(capsys.readouterr().err)[0]
    )


def test_metrics_that_cannot_be_written_end_the_run(
    dead: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is full at step 6: one line, exit code 1, and after room was made the run goes on."""
    write = MetricsWriter.write

    def full(self: MetricsWriter, step: int, metrics: dict[str, float]) -> None:
        if step == 6:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        write(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", full)
        assert exit_code(dead) == 1
    (error,) = error_lines(capsys.readouterr().err)
    assert error.startswith("error: the disk is full: cannot write metrics.jsonl, at least 1 byte: ")
    assert steps(run(dead)) == [1, 2, 3, 4, 5, 6]


# --- finished --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["auto", "itself"])
def test_a_finished_run_says_so_and_touches_nothing(
    done: Config, capsys: pytest.CaptureFixture[str], resume: str
) -> None:
    run_dir = Path(str(done.train.run_dir))
    before = snapshot(run_dir)
    assert exit_code(changed(done, checkpoint__resume=resume if resume == "auto" else str(run_dir))) == 0
    assert f"{run_dir} is finished: its 6 steps are done" in capsys.readouterr().err
    assert snapshot(run_dir) == before


def test_a_finished_run_may_be_made_longer(done: Config, eight: Path, folders: Path) -> None:
    """8 steps instead of 6, at a constant rate: as if they had been asked for at once. Where it dies between its last
    checkpoint and the export, the old final/ is not taken for its result.
    """
    longer = changed(done, train__steps=8)
    parts = run(longer)
    assert steps(parts) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert same_weights(eight / "final", parts / "final")
    assert not same_weights(folders / "done" / "final", parts / "final")
    shutil.rmtree(parts / "final")  # as if the export had not come about
    assert (parts / "final.old" / "config.json").is_file() and (parts / "report.html.old").is_file()
    run(longer)
    assert same_weights(eight / "final", parts / "final")


def test_a_page_that_a_kill_prevented_is_written_by_the_next_start(done: Config) -> None:
    """None at all, and one that was written while the run was going on."""
    page = Path(str(done.train.run_dir)) / "report.html"
    written = page.read_bytes()[:100]
    page.unlink()
    assert exit_code(done) == 0
    assert page.read_bytes()[:100] == written
    page.write_text("going on")
    os.utime(page, (1e9, 1e9))
    assert exit_code(done) == 0
    assert page.read_bytes()[:100] == written


def test_the_size_of_what_is_put_aside_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """3 KiB each: of the first alone, then of both together; of a file nothing."""
    path, told = tmp_path / "final", []
    for _ in range(2):
        path.mkdir()
        (path / "model.safetensors").write_bytes(bytes(3072))
        _put_aside(path)
        told.append(capsys.readouterr().err.partition("renamed to ")[2])
    assert told == [
        f"{path}.old; it takes 3.0 KiB, which you may remove\n",
        f"{path}.old-1; final.old and later ones take 6.0 KiB, which you may remove\n",
    ]
    (tmp_path / "metrics.jsonl").write_text("{}")
    _put_aside(tmp_path / "metrics.jsonl")
    assert capsys.readouterr().err.endswith(f"renamed to {tmp_path}/metrics.jsonl.old\n")


def test_fewer_steps_than_are_done_export_what_there_is(
    dead: Config, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoint 4, and train.steps is now 3: nothing is trained or undone, final/ is step 4 and is called so."""
    run_dir = run(changed(dead, train__steps=3))
    assert f"done: 4 steps, the model is in {run_dir / 'final'}" in capsys.readouterr().err
    four = run(six_steps(folders, tmp_path / "four", train__steps=4))
    assert same_weights(run_dir / "final", four / "final")
    assert exit_code(changed(dead, train__steps=3)) == 0
    assert f"{run_dir} is finished: its 4 steps are done" in capsys.readouterr().err


def cut_sums(final: Path) -> None:
    """Damages the weights, whose digest goes with the last lines of SHA256SUMS."""
    flip(final / "model.safetensors")
    lines = (final / "SHA256SUMS").read_text().splitlines(keepends=True)
    (weights,) = [number for number, line in enumerate(lines) if "model.safetensors" in line]
    assert weights
    (final / "SHA256SUMS").write_text("".join(lines[:weights]))


DAMAGES = {
    "a flipped bit": lambda final: flip(final / "model.safetensors"),
    "cut": lambda final: os.truncate(final / "model.safetensors", 1000),
    "a lost file": lambda final: (final / "generation_config.json").unlink(),
    "sums of nothing": lambda final: (final / "SHA256SUMS").write_text(""),
    "no sums": lambda final: (final / "SHA256SUMS").unlink(),
    "sums cut at the end of a line": lambda final: cut_sums(final),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_model_is_not_finished(
    done: Config, folders: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told, put aside and exported again; then the run is finished."""
    final = Path(str(done.train.run_dir)) / "final"
    DAMAGES[how](final)
    assert exit_code(done) == 0
    said = capsys.readouterr().err
    assert f"WARNING: {final} is damaged, and is exported again: " in said
    assert "is finished: its 6 steps are done" not in said
    assert same_weights(final, folders / "done" / "final")
    assert final.with_name("final.old").is_dir()
    assert exit_code(done) == 0
    assert "is finished: its 6 steps are done" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "is_damage"), [(errno.ESTALE, False), (errno.EACCES, False), (errno.EIO, True)])
def test_a_model_that_cannot_be_read_now_is_not_damaged(
    done: Config, capsys: pytest.CaptureFixture[str], code: int, is_damage: bool
) -> None:
    """A server that does not answer: the start ends with the path, and leaves the model as it is."""
    final = Path(str(done.train.run_dir)) / "final"
    before = snapshot(final)

    def failing(path: Path) -> str:
        if path.parent == final:
            raise OSError(code, os.strerror(code), str(path))
        return sha256_of(path)

    with patch("dpo.base.sums.sha256_of", failing):
        assert exit_code(done) == (0 if is_damage else 1)
    said = capsys.readouterr().err
    assert (f"WARNING: {final} is damaged, and is exported again: a file cannot be read: " in said) is is_damage
    assert (snapshot(final) == before) is not is_damage
    assert is_damage or f"{os.strerror(code)}: '{final}/" in error_lines(said)[0]


def test_a_card_that_was_edited_is_no_damage(done: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """People write their own words there. A file that they add is theirs, too."""
    final = Path(str(done.train.run_dir)) / "final"
    (final / "README.md").write_text("my model")
    (final / "notes.txt").write_text("mine")
    assert exit_code(done) == 0
    assert "is finished: its 6 steps are done" in capsys.readouterr().err
    assert (final / "README.md").read_text() == "my model"


def test_a_model_of_an_older_version_is_believed(done: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no hashes, which is told."""
    final = Path(str(done.train.run_dir)) / "final"
    (final / "SHA256SUMS").unlink()
    record = final.with_name("provenance.json")
    record.write_text(record.read_text().replace('"first_step"', '"another"'))
    assert exit_code(done) == 0
    said = capsys.readouterr().err
    assert f"{final} has no SHA256SUMS: an older version wrote it, and its files are not compared" in said
    assert "is finished: its 6 steps are done" in said


# --- links -----------------------------------------------------------------------------------------------------------


def test_checkpoints_on_another_disk(dead: Config, folders: Path, tmp_path: Path) -> None:
    """The folder of all checkpoints is a link: the run goes on as if it were none."""
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.rename(tmp_path / "elsewhere")
    checkpoints.symlink_to(tmp_path / "elsewhere")
    run(dead)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / "metrics.jsonl.old").exists()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == [f"step-00000{i}" for i in (2, 4, 6)]
    assert checkpoints.is_symlink()
    assert same_weights(tmp_path / "run" / "final", folders / "done" / "final")


def test_one_checkpoint_on_another_disk(
    dead: Config, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run resumes from it. Where it is not kept, its link is removed, and its files stay, which is told."""
    four = checkpoint_path(tmp_path / "run", 4)
    four.rename(tmp_path / "elsewhere")
    four.symlink_to(tmp_path / "elsewhere")
    run(changed(dead, checkpoint__keep=1))
    assert [path.name for path in four.parent.iterdir()] == ["step-000006"]
    assert (tmp_path / "elsewhere" / "COMPLETE").is_file()
    told = f"{four} is a link: the link is removed, its files stay in {tmp_path / 'elsewhere'}"
    assert told in capsys.readouterr().err
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / "metrics.jsonl.old").exists()
    assert same_weights(tmp_path / "run" / "final", folders / "done" / "final")


def test_a_disk_that_is_not_mounted_is_found_before_any_work(
    dead: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if there were no checkpoints the run would begin anew, and fail at the first."""
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path / "run")
    assert exit_code(dead) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert f"train.run_dir: {checkpoints} is a link to {tmp_path / 'elsewhere'}, which is no folder; valid: " in error
    assert snapshot(tmp_path / "run") == before


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_lines_after_the_checkpoint_are_cut(dead: Config) -> None:
    run_dir = Path(str(dead.train.run_dir))
    assert steps(run_dir) == [1, 2, 3, 4, 5]
    assert find_start(dead).step == 4
    assert steps(run_dir) == [1, 2, 3, 4, 5]  # looking changes nothing
    run(dead)
    assert steps(run_dir) == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in eval_lines(run_dir)] == [0, 3, 6]
    assert [line["step"] for line in read_metrics(run_dir) if "reference/seconds" in line] == [0]  # it computed nothing


@pytest.mark.parametrize("rest", ['{"step": 5, "train/lo', '{"step": 5, "train/loss": 0.69}'])
def test_a_half_written_last_line_is_cut(dead: Config, rest: str) -> None:
    """Whatever follows the last line's end was being written when the machine failed."""
    run_dir = Path(str(dead.train.run_dir))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(rest)
    assert steps(run(dead)) == [1, 2, 3, 4, 5, 6]
    assert all(json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())


# --- FOLDER ----------------------------------------------------------------------------------------------------------


def test_back_to_an_earlier_checkpoint_of_the_same_run(
    done: Config, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps after it are done again and stand once; its newer checkpoints are put aside, not believed. It is the
    same run however the folder is spelt.
    """
    monkeypatch.chdir(tmp_path)
    two = checkpoint_path(tmp_path / "run", 2)
    for named in (two, two.relative_to(tmp_path), two.parent / ".." / "checkpoints" / two.name):
        back = changed(done, train__run_dir="run", checkpoint__resume=str(named))
        assert find_start(back).step == 2  # of another run, the newest of this one would be taken
    trackers = tmp_path / "run" / "trackers"
    trackers.mkdir()
    (trackers / "wandb.jsonl").write_text('{"id": "0123abcd"}\n')
    run_until(back, 3)
    assert (trackers.with_name("trackers.old") / "wandb.jsonl").is_file() and not trackers.exists()
    assert steps(tmp_path / "run") == [1, 2]
    assert evaluation_steps(tmp_path / "run") == [0]  # those after steps 3 and 6 are gone
    assert find_start(done).step == 2
    assert checkpoint_path(tmp_path / "run", 6).with_name("step-000006.old").is_dir()
    run(done)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert same_weights(folders / "done" / "final", tmp_path / "run" / "final")


def test_a_job_that_goes_back_and_is_queued_again_goes_on(done: Config, folders: Path, tmp_path: Path) -> None:
    """The same command once more does not go back again: each start would lose what the one before has made. A start
    without it in between, or newer checkpoints moved away, and it goes back.
    """
    two = checkpoint_path(tmp_path / "run", 2)
    back = changed(done, checkpoint__resume=str(two), checkpoint__save_every=1, checkpoint__keep=1)
    run_until(back, 4)
    assert find_start(back).step == 3 and not two.exists()
    run(back)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert same_weights(folders / "done" / "final", tmp_path / "run" / "final")
    assert find_start(back).step == 6
    run(changed(done, train__steps=7))
    with pytest.raises(UserError, match="no such folder"):
        find_candidates(back)


def test_a_start_that_is_killed_while_it_goes_back_goes_back_again(
    done: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer checkpoint is still there: it is of the steps that are to be made again."""
    back = changed(done, checkpoint__resume=str(checkpoint_path(tmp_path / "run", 2)))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(RunError("the power is gone")))
        with pytest.raises(RunError):
            run(back)
    assert checkpoint_path(tmp_path / "run", 6).is_dir()
    assert find_start(back).step == 2


@pytest.mark.parametrize("whole_run", [False, True])
def test_on_from_another_run(done: Config, folders: Path, tmp_path: Path, whole_run: bool) -> None:
    """A checkpoint, or the newest one of a run folder; the other run stays as it is."""
    other = tmp_path / "run"
    before = snapshot(other)
    named = other if whole_run else checkpoint_path(other, 4)
    config = changed(done, train__run_dir=str(tmp_path / "new"), train__steps=8, checkpoint__resume=str(named))
    run(config)
    assert steps(tmp_path / "new") == ([7, 8] if whole_run else [5, 6, 7, 8])
    assert snapshot(other) == before


def test_the_same_command_again_after_an_interruption(done: Config, tmp_path: Path) -> None:
    """A job that began at another run's checkpoint and is started again goes on from its own; done, it is done."""
    named = str(checkpoint_path(tmp_path / "run", 2))
    config = changed(done, train__run_dir=str(tmp_path / "new"), checkpoint__resume=named)
    run_until(config, 4)  # before its first own checkpoint
    run_until(config, 6)
    assert steps(tmp_path / "new") == [3, 4, 5]
    assert find_start(config).step == 4
    run(config)
    assert steps(tmp_path / "new") == [3, 4, 5, 6]
    before = snapshot(tmp_path / "new")
    assert exit_code(config) == 0
    assert snapshot(tmp_path / "new") == before


def test_a_named_folder_that_is_no_checkpoint(done: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for folder, what in ((tmp_path / "absent", "no such folder"), (tmp_path / "empty", "it is not complete")):
        config = changed(done, train__run_dir=str(tmp_path / "new"), checkpoint__resume=str(folder))
        assert exit_code(config) == 2
        (error,) = error_lines(capsys.readouterr().err)
        assert error.startswith("error: CONFIG: checkpoint.resume: ")
        assert what in error
    assert not (tmp_path / "new").exists()
