"""Payloads in the files of a checkpoint, marker and hashes rewritten to match: nothing of them is run, by any program.

Trusted, and not tried here: the code, messages between ranks, RUN/jobs, compiled kernels, `trust_remote_code`.
"""

import io
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict

from dpo.checkpoint import saver
from dpo.checkpoint.folders import checkpoint_path
from dpo.config import Config, to_yaml
from dpo.export import program as export
from tests.commands.test_sample import save_talker
from tests.support.checkpoints import Payload, forget_hash, read_plainly, remark
from tests.support.models import save_pairs
from tests.support.processes import start_program
from tests.support.runs import (
    changed,
    error_lines,
    exit_code,
    exit_code_of,
    make_config,
    run,
    run_until,
    same_weights,
    six_steps,
    train_lines,
    without_clock,
)


@pytest.fixture
def dead(dead_root: Path, tmp_path: Path) -> Config:
    """The dead run, copied, with its checkpoint of step 4 alone."""
    shutil.copytree(dead_root / "dead", tmp_path / "run")
    shutil.rmtree(checkpoint_path(tmp_path / "run", 2))
    return six_steps(dead_root, tmp_path / "run")


def in_metadata(folder: Path, witness: Path) -> None:
    """The whole file is a payload."""
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(witness)))


def beside_tensors(folder: Path, witness: Path) -> None:
    """All tensors are there, and the place of each is too."""
    metadata = replace(read_plainly(folder), planner_data=Payload(witness))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_a_shard(folder: Path, witness: Path) -> None:
    """A weight becomes an entry that is no tensor; torch would unpickle it from the shard with any name."""
    metadata = read_plainly(folder)
    index = next(index for index in metadata.storage_data if index.fqn == "model.lm_head.weight")
    content = pickle.dumps(Payload(witness))
    place = metadata.storage_data[index]
    with (folder / place.relative_path).open("r+b") as shard:
        shard.seek(place.offset)
        shard.write(content)
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    metadata.storage_data[replace(index, offset=None)] = replace(place, length=len(content))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_a_tensor(folder: Path, witness: Path) -> None:
    """The bytes of a weight, which torch reads as tensors alone."""
    metadata = read_plainly(folder)
    index = next(index for index in metadata.storage_data if index.fqn == "model.lm_head.weight")
    place = metadata.storage_data[index]
    content = io.BytesIO()
    torch.save(Payload(witness), content)
    with (folder / place.relative_path).open("r+b") as shard:
        shard.seek(place.offset)
        shard.write(content.getvalue())
    metadata.storage_data[index] = replace(place, length=len(content.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_the_state(folder: Path, witness: Path) -> None:
    (folder / "state.json").write_bytes(pickle.dumps(Payload(witness)))


PLANTED = {
    "whole .metadata": (in_metadata, ".metadata: it asks for posix.mkdir, which no checkpoint needs", 2),
    "part of .metadata": (beside_tensors, ".metadata: it asks for posix.mkdir, which no checkpoint needs", 2),
    "state.json": (in_the_state, "state.json: not the state of a run", 2),
    "tensor of a shard": (in_a_tensor, "Weights only load failed", 1),
    "entry of a shard": (in_a_shard, "Missing key in checkpoint state_dict: model.lm_head.weight", 1),
}


@pytest.mark.parametrize("plant, line, code", PLANTED.values(), ids=PLANTED.keys())
def test_a_payload_is_not_run(
    dead: Config,
    tmp_path: Path,
    plant: Callable[[Path, Path], None],
    line: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not on resume, not by a run that begins at the checkpoint, not by an export: one line of error."""
    four, witness = checkpoint_path(tmp_path / "run", 4), tmp_path / "witness"
    plant(four, witness)
    remark(four)
    elsewhere = changed(dead, train__run_dir=str(tmp_path / "new"), checkpoint__resume=str(four))
    words = ["dpo.export", "--checkpoint", str(four), "--out", str(tmp_path / "out")]
    starts: list[Callable[[], int]] = [
        lambda: exit_code(dead),
        lambda: exit_code(elsewhere),
        lambda: exit_code_of(export.main, *words),
    ]
    for start in starts:
        capsys.readouterr()
        assert start() == code
        (error,) = error_lines(capsys.readouterr().err)
        assert line in error
    assert not witness.exists()
    assert not (tmp_path / "out").exists()


def test_an_older_checkpoint_is_used_instead(
    dead_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(dead_root / "dead", tmp_path / "run"))
    in_metadata(checkpoint_path(run_dir, 4), tmp_path / "witness")
    remark(checkpoint_path(run_dir, 4))
    run(six_steps(dead_root, run_dir))
    assert f"resumes from {checkpoint_path(run_dir, 2)}" in capsys.readouterr().err
    assert not (tmp_path / "witness").exists()


# --- older versions --------------------------------------------------------------------------------------------------


def as_before(witness: Path) -> Callable[..., dict[str, Any]]:
    """`state_tensors` as it was: with the settings, of which torch writes pickles; here one is a payload."""

    def state(model: Any, optimizer: Any) -> dict[str, Any]:
        weights, optimizer_state = get_state_dict(model, optimizer)
        optimizer_state["param_groups"][0]["lr"] = Payload(witness)
        return {"model": weights, "optimizer": optimizer_state}

    return state


def test_a_checkpoint_of_an_older_version_is_loaded(
    dead_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With settings in it, of which nothing is read, and no hash for its shard, which is told: bitwise the same run."""
    with patch.object(saver, "state_tensors", as_before(tmp_path / "witness")):
        config = six_steps(dead_root, tmp_path / "run")
        run_until(config, 6)
    four = checkpoint_path(tmp_path / "run", 4)
    assert "optimizer.param_groups.0.lr" in read_plainly(four).state_dict_metadata
    forget_hash(four, "__0_0.distcp")
    capsys.readouterr()
    run(config)
    told = f"checkpoint {four} was written by an older version: 1 of its 3 files are over 64 MiB and compared by size"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "witness").exists()
    whole = run(six_steps(dead_root, tmp_path / "whole"))
    assert without_clock(train_lines(tmp_path / "run")) == without_clock(train_lines(whole))
    assert same_weights(tmp_path / "run" / "final", whole / "final")


def test_a_new_checkpoint_has_tensors_alone(dead_root: Path) -> None:
    metadata = read_plainly(checkpoint_path(dead_root / "dead", 4))
    assert not [name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]


# --- every name that any pickle asks for -----------------------------------------------------------------------------

AUDITED = """
import sys
from pathlib import Path
from dpo.export import program as export
from dpo.sample import program as sample
from dpo.score import program as score
from dpo.train import program as train
from tests.support.runs import exit_code_of

def is_message(frame):
    "Whether the pickle came from another rank: torch makes objects of tensors there alone."
    while frame:
        if frame.f_code.co_name == "_tensor_to_object" and frame.f_code.co_filename.endswith("distributed_c10d.py"):
            return True
        frame = frame.f_back
    return False

asked = {True: set(), False: set()}

def note(event, names):
    if event == "pickle.find_class":
        asked[is_message(sys._getframe())].add(names)

def do(main, *words):
    assert exit_code_of(main, "program", *words) == 0, words

root = Path(sys.argv[1])
sys.addaudithook(note)
do(train.main, "--config", str(root / "fresh.yaml"))
do(train.main, "--config", str(root / "resumed.yaml"))
do(train.main, "--config", str(root / "elsewhere.yaml"))
do(export.main, "--checkpoint", str(root / "run"), "--out", str(root / "out"))
do(score.main, "--model", str(root / "out"), "--config", str(root / "fresh.yaml"))
do(sample.main, "--model", str(root / "out"), "--prompts", str(root / "prompts.txt"), "--max-new-tokens", "2")
assert ("torch.distributed.checkpoint.planner", "LoadPlan") in asked[True]
(root / "asked").write_text("".join(f"{module} {name}\\n" for module, name in sorted(asked[False])))
"""


def test_no_program_unpickles_a_file(tmp_path: Path) -> None:
    """Python tells an audit hook each name that a pickle asks for. Of those that are no messages between ranks there is
    none: fresh, resumed, begun at another run's checkpoint, exported, scored, sampled.
    """
    save_talker(tmp_path / "model", "llama", 0)
    save_pairs(tmp_path / "pairs.jsonl", 8)
    (tmp_path / "prompts.txt").write_text("ab\n")
    config = make_config(
        tmp_path / "model",
        tmp_path / "pairs.jsonl",
        tmp_path / "run",
        batch__pairs_per_step=4,
        train__steps=2,
        reference__cache_dir=str(tmp_path / "cache"),
    )
    elsewhere = {"train__run_dir": str(tmp_path / "new"), "checkpoint__resume": str(tmp_path / "run")}
    for name, changes in {"fresh": {}, "resumed": {}, "elsewhere": elsewhere}.items():
        steps = {"fresh": 2, "resumed": 3, "elsewhere": 4}[name]
        (tmp_path / f"{name}.yaml").write_text(to_yaml(changed(config, train__steps=steps, **changes)))
    process = start_program(AUDITED, [str(tmp_path)], tmp_path / "stderr")
    process.join()
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()[-3000:]
    assert (tmp_path / "asked").read_text() == ""
