"""Checkpoints: an interrupted run goes on as if nothing had happened, from files that are whole, on any ranks."""

import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.board.writer import MetricsWriter
from dpo.checkpoint import saver as saving
from dpo.checkpoint.folders import DRAFT, checkpoint_path
from dpo.config import Config, SourceConfig
from tests.support.checkpoints import newest_checkpoint
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import (
    changed,
    eval_lines,
    exit_code,
    make_config,
    run,
    run_until,
    same_weights,
    train_lines,
    weights_of,
    without_clock,
    worst_relative,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl and eval.jsonl."""
    root = tmp_path_factory.mktemp("checkpoint")
    save_model(root / "model", "llama-tied")
    save_pairs(root / "pairs.jsonl", 10)
    save_pairs(root / "eval.jsonl", 3, seed=1)
    return root


def six_steps(folders: Path, run_dir: Path, **changes: Any) -> Config:
    """Six steps of four of ten pairs, warm-up and cosine, a checkpoint and an evaluation every second step."""
    facts = {
        "data__eval": [SourceConfig(str(folders / "eval.jsonl"))],
        "batch__pairs_per_step": 4,
        "batch__tokens_per_micro_batch": 80,
        "train__steps": 6,
        "train__eval_every": 2,
        "optim__lr": 1e-3,
        "optim__warmup_steps": 3,
        "optim__schedule": "cosine",
        "checkpoint__save_every": 2,
        "checkpoint__keep": None,
    }
    return make_config(folders / "model", folders / "pairs.jsonl", run_dir, **(facts | changes))


@pytest.fixture
def config(folders: Path, tmp_path: Path) -> Config:
    """`six_steps` in a folder of the test."""
    return six_steps(folders, tmp_path / "whole")


@pytest.fixture(scope="module")
def whole(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of `six_steps`; tests only read it."""
    root = tmp_path_factory.mktemp("whole")
    return run(six_steps(folders, root / "whole", reference__cache_dir=str(root / "cache")))


def twin(config: Config, tmp_path: Path) -> Config:
    """The same run in another folder."""
    return changed(config, train__run_dir=str(tmp_path / "parts"))


def assert_same_run(whole: Path, parts: Path) -> None:
    """All lines but the clock's and the weights are equal, to the last bit, each step once."""
    assert without_clock(train_lines(parts)) == without_clock(train_lines(whole))
    assert without_clock(eval_lines(parts)) == without_clock(eval_lines(whole))
    assert [line["step"] for line in train_lines(parts)] == list(range(1, 7))
    assert [line["step"] for line in eval_lines(parts)] == [0, 2, 4, 6]
    assert same_weights(whole / "final", parts / "final")


# --- bitwise ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "rmsprop, momentum": {"optim__name": "rmsprop", "optim__momentum": 0.9, "optim__weight_decay": 0.1},
    "adamw": {"optim__name": "adamw", "optim__weight_decay": 0.1},
    "sgd": {"optim__name": "sgd", "optim__lr": 0.1},
    "sgd, momentum": {"optim__name": "sgd", "optim__lr": 0.1, "optim__momentum": 0.9, "optim__weight_decay": 0.1},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_interrupted_run_goes_on_to_the_last_bit(config: Config, tmp_path: Path, optimizer: str) -> None:
    """The machine fails before step 6: what was written after the checkpoint of step 4 is done again."""
    config = changed(config, **OPTIMIZERS[optimizer])
    whole, parts = run(config), run_until(twin(config, tmp_path), 6)
    assert [line["step"] for line in train_lines(parts)] == [1, 2, 3, 4, 5]
    torch.manual_seed(12345)  # no state of the process plays a role
    run(twin(config, tmp_path))
    assert_same_run(whole, parts)


def test_two_interruptions(config: Config, whole: Path, tmp_path: Path) -> None:
    """Before the first checkpoint (a fresh start follows), and after the second."""
    parts = run_until(twin(config, tmp_path), 2)
    run_until(twin(config, tmp_path), 5)
    run(twin(config, tmp_path))
    assert_same_run(whole, parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__name": "sft", "parallel__cpu_offload": True},
        {
            "loss__name": "ipo",
            "loss__length_normalized": True,
            "loss__sft_weight": 0.3,
            "parallel__compute_dtype": "bfloat16",
            "parallel__activation_checkpointing": "full",
            "batch__group_by_prompt": True,
        },
        {"train__steps": None, "train__epochs": 2, "data__order": "sequential"},
    ],
)
def test_every_kind_of_run_goes_on(config: Config, tmp_path: Path, changes: dict[str, object]) -> None:
    """Two epochs of ten pairs in steps of four are five steps."""
    config = changed(config, **changes)
    whole, parts = run(config), run_until(twin(config, tmp_path), 4)
    run(twin(config, tmp_path))
    assert without_clock(train_lines(parts)) == without_clock(train_lines(whole))
    assert without_clock(eval_lines(parts)) == without_clock(eval_lines(whole))
    assert len(train_lines(parts)) == (5 if config.train.epochs else 6)
    assert same_weights(whole / "final", parts / "final")


def test_a_run_that_died_between_its_last_checkpoint_and_the_export(folders: Path, whole: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(whole, tmp_path / "parts"))
    shutil.rmtree(parts / "final")
    run(six_steps(folders, parts))
    assert_same_run(whole, parts)


def test_a_deleted_cache_is_rebuilt_from_the_reference(config: Config, whole: Path, tmp_path: Path) -> None:
    """The resumed policy must never become the reference: at this learning rate it is nats away from it."""
    parts = run_until(twin(config, tmp_path), 5)
    shutil.rmtree(tmp_path / "reference-cache")
    run(twin(config, tmp_path))
    assert_same_run(whole, parts)
    assert abs(train_lines(parts)[4]["train/rewards/chosen"]) > 1e-3


# --- on other ranks --------------------------------------------------------------------------------------------------


def train_as_rank(config: Config, stop: int | None) -> None:
    """A rank of a run that dies before step `stop`."""
    if stop:
        run_until(config, stop)
    else:
        run(config)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_a_run_goes_on_with_another_number_of_ranks(
    config: Config, ranks: Ranks, tmp_path: Path, optimizer: str
) -> None:
    """2 ranks to the checkpoint of step 2, one to that of step 4, 3 to the end: as on one rank, to 1e-5 relative.

    At a learning rate of 1e-5 rounding does not grow yet. The weights agree to 1e-6 of their norm: RMSprop without
    its state would make a step of 10 lr = 1e-4 everywhere, 1e-3 of weights of about 0.1; AdamW one of lr, 1e-4.
    """
    config = changed(config, optim__name=optimizer, optim__lr=1e-5)
    whole = run(config)
    parts = twin(config, tmp_path)
    ranks(2, train_as_rank, parts, 4)
    run_until(parts, 5)
    ranks(3, train_as_rank, parts, None)
    names = ["train/loss", "train/grad_norm", "train/logps/chosen", "train/logps/rejected", "train/lr"]
    folder = tmp_path / "parts"
    assert worst_relative(train_lines(whole), train_lines(folder), names) < 1e-5
    assert worst_relative(eval_lines(whole), eval_lines(folder), ["eval/loss", "eval/logps/chosen"]) < 1e-5
    ours, theirs = (torch.cat([w.flatten() for w in weights_of(run / "final").values()]) for run in (whole, folder))
    assert (ours - theirs).norm() < 1e-6 * ours.norm()


# --- the optimizer's settings ----------------------------------------------------------------------------------------


CHANGES: dict[str, list[dict[str, object]]] = {
    "adamw": [{"optim__weight_decay": 0.5}, {"optim__betas": (0.5, 0.5)}],
    "rmsprop": [{"optim__alpha": 0.5}, {"optim__eps": 1e-3}, {"optim__momentum": 0.0}],
    "sgd": [{"optim__momentum": 0.1}],
}


@pytest.mark.parametrize("optimizer", CHANGES)
def test_changed_settings_of_the_optimizer_count(config: Config, tmp_path: Path, optimizer: str) -> None:
    """A checkpoint has the optimizer's state, not its settings: they are those of the config that goes on."""
    config = changed(config, optim__name=optimizer, optim__momentum=0.0 if optimizer == "adamw" else 0.9)
    run_until(config, 5)
    folders = [tmp_path / f"parts-{number}" for number in range(len(CHANGES[optimizer]))]
    for folder in folders:
        shutil.copytree(tmp_path / "whole", folder)
    as_before = run(config)
    for folder, changes in zip(folders, CHANGES[optimizer], strict=True):
        otherwise = run(changed(config, train__run_dir=str(folder), **changes))
        same = [a == b for a, b in zip(train_lines(as_before)[:4], train_lines(otherwise)[:4], strict=True)]
        assert all(same)
        assert not same_weights(as_before / "final", otherwise / "final"), changes


def test_a_state_that_does_not_fit_is_one_line(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Momentum switched on: the checkpoint has no buffer for it, and says which tensor is missing."""
    config = changed(config, optim__name="sgd")
    run_until(config, 3)
    capsys.readouterr()
    assert exit_code(changed(config, optim__momentum=0.9)) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert str(checkpoint_path(tmp_path / "whole", 2)) in error
    assert "momentum_buffer" in error


# --- kept ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_older_one(config: Config, whole: Path, tmp_path: Path) -> None:
    parts = run_until(twin(config, tmp_path), 6)
    (checkpoint_path(parts, 4) / "COMPLETE").unlink()
    (parts / "checkpoints" / "step-000006.tmp").mkdir()
    (parts / "checkpoints" / "step-000006.tmp" / "__7_0.distcp").write_bytes(b"of a run on eight ranks")
    (parts / "checkpoints" / "step-000099.tmp").mkdir()
    run(twin(config, tmp_path))
    assert_same_run(whole, parts)
    assert newest_checkpoint(parts) == checkpoint_path(parts, 6)
    assert sorted(path.name for path in checkpoint_path(parts, 6).iterdir()) == [
        ".metadata",
        "COMPLETE",
        "__0_0.distcp",
        "state.json",
    ]
    assert not list((parts / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("keep, kept", [(1, [6]), (2, [4, 6])])
def test_keep(config: Config, tmp_path: Path, keep: int, kept: list[int]) -> None:
    run(changed(config, checkpoint__keep=keep, data__eval=[], train__eval_every=None))
    assert saved_steps(tmp_path / "whole") == kept


def test_all_are_kept(whole: Path) -> None:
    """`checkpoint.keep` is null."""
    assert saved_steps(whole) == [2, 4, 6]


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints of a run, which holds nothing else beside them."""
    found = sorted((run_dir / "checkpoints").iterdir())
    steps = [int(path.name.removeprefix("step-")) for path in found]
    assert found == [checkpoint_path(run_dir, step) for step in steps]
    return steps


@pytest.mark.parametrize("save_every, saved", [(None, [3]), (2, [2, 3])])
def test_a_checkpoint_at_the_end_in_any_case(
    config: Config, tmp_path: Path, save_every: int | None, saved: list[int]
) -> None:
    run(changed(config, train__steps=3, checkpoint__save_every=save_every))
    assert saved_steps(tmp_path / "whole") == saved


# --- by a thread -----------------------------------------------------------------------------------------------------


def test_metrics_are_on_the_disk_before_a_checkpoint_is(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread that writes: every line up to the checkpoint's step is there and waited for, then it is renamed."""
    events: list[tuple[str, int]] = []
    sync, rename = MetricsWriter.sync, Path.rename

    def synced(writer: MetricsWriter) -> None:
        sync(writer)
        events.append(("synced", len(train_lines(tmp_path / "whole"))))

    def renamed(path: Path, target: Path) -> Path:
        if target.name.startswith("step-") and target.suffix != DRAFT:  # not one that is removed
            events.append(("renamed", int(target.name.removeprefix("step-"))))
        return rename(path, target)

    monkeypatch.setattr(MetricsWriter, "sync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    run(config)
    assert [what for what, _ in events] == ["synced", "renamed"] * 3
    assert [step for what, step in events if what == "renamed"] == [2, 4, 6]
    assert all(lines >= step for (_, lines), (_, step) in zip(events[::2], events[1::2], strict=True))


def test_metrics_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an fsync of metrics.jsonl itself, after all of its lines were handed to the system."""
    synced: list[tuple[int, str]] = []
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_ino, path.read_text())))
    with MetricsWriter(tmp_path, []) as writer:
        writer.write(1, {"train/loss": 0.5})
        writer.sync()
        assert synced == [(path.stat().st_ino, '{"step": 1, "train/loss": 0.5}\n')]


class Groups(TorchDispatchMode):
    """Notes the process groups of the collectives that run under it, in its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            groups = [dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)]
            self.names |= {group.group_name for group in groups}
        return func(*args, **kwargs or {})


def groups_of_writing(config: Config) -> tuple[set[str], set[str]]:
    """The groups that writing used, and those it was given."""
    write, used, given = saving.write_checkpoint, set(), set()

    def noted(*args: Any) -> None:
        with Groups() as groups:
            write(*args)
        used.update(groups.names)
        given.add(args[0].group.group_name)

    with patch.object(saving, "write_checkpoint", noted):
        run(config)
    return used, given


@pytest.mark.xdist_group("ranks")
def test_writing_uses_its_own_group_alone(config: Config, ranks: Ranks) -> None:
    """On the group of training its exchanges would be taken for those of a step."""
    for used, given in ranks(2, groups_of_writing, changed(config, train__steps=2)):
        assert used == given
        assert len(given) == 1


# --- failing while saving --------------------------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, half_done: bool) -> None:
    """The `call`-th dcp.save of a checkpoint fails, before or after its files are written."""
    save, calls = dcp.save, []

    def failing(tensors: dict, **kwargs: object) -> None:
        if "optimizer" in tensors:
            calls.append(1)
        if len(calls) != call:
            save(tensors, **kwargs)
            return
        if half_done:
            save(tensors, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp, "save", failing)


@pytest.mark.parametrize("half_done", [False, True])
def test_a_crash_while_saving_leaves_the_one_before(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half_done: bool
) -> None:
    """keep is 1: were the old one removed first, there would be none."""
    parts = changed(twin(config, tmp_path), checkpoint__keep=1)
    with monkeypatch.context() as patch:
        fail_at(patch, 2, half_done)
        assert exit_code(parts) == 1
    assert newest_checkpoint(tmp_path / "parts") == checkpoint_path(tmp_path / "parts", 2)
    run(parts)
    assert_same_run(whole, tmp_path / "parts")


def test_a_full_disk_is_one_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What torch raises when a rank cannot write is no Exception at all, and carries a traceback a rank. The run ends
    when the second checkpoint could not be written either.
    """

    def full(self: object, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    assert exit_code(config) == 1
    said = capsys.readouterr().err
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert error.startswith("error: the disk is full: rank 0 cannot write ") and re.search(
        r"step-000004\.tmp, [\d.]+ KiB in all: ", error
    )
    assert "WARNING: a checkpoint was not written: " in said and "step-000002.tmp" in said
    assert newest_checkpoint(tmp_path / "whole") is None
