"""What may change between the parts of one run, and is logged, and what would make it another run, and is refused."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from dpo.checkpoint.folders import checkpoint_path
from dpo.config import Config, LossConfig, SourceConfig, load_config
from dpo.ref_logps.blocks import read_rows
from tests.support.models import save_model
from tests.support.runs import changed, error_lines, exit_code, find_start, run, same_weights, six_steps, snapshot


@pytest.fixture
def dead(dead_root: Path, tmp_path: Path) -> Config:
    """The dead run, copied: metrics up to step 5, checkpoints of 2 and 4."""
    shutil.copytree(dead_root / "dead", tmp_path / "run")
    return six_steps(dead_root, tmp_path / "run")


IDENTITY = {
    "train.seed": {"train__seed": 1},
    "data.order": {"data__order": "sequential"},
    "batch.group_by_prompt": {"batch__group_by_prompt": True},
    "batch.pairs_per_step": {"batch__pairs_per_step": 5},
    "optim.name": {"optim__name": "adamw"},
    "loss.name": {"loss__name": "ipo"},
    "loss.beta": {"loss__beta": 0.2},
    "loss.label_smoothing": {"loss__label_smoothing": 0.1},
    "loss.length_normalized": {"loss__length_normalized": True},
    "loss.sft_weight": {"loss__sft_weight": 0.1},
}


@pytest.mark.parametrize("key", IDENTITY)
def test_what_makes_it_another_run_is_refused(dead: Config, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = Path(str(dead.train.run_dir))
    before = snapshot(run_dir)
    assert exit_code(changed(dead, **IDENTITY[key])) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert error.startswith(f"error: CONFIG: {key}: cannot resume from {checkpoint_path(run_dir, 4)}: ")
    assert error.endswith("valid: the same as before, or another train.run_dir")
    assert snapshot(run_dir) == before


def test_other_pairs_are_refused(dead: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One token of one completion; two rows in another order; fewer tokens a completion: each is other data."""
    rows = Path(dead.data.train[0].path).read_text().splitlines(keepends=True)
    first = json.loads(rows[0])
    first["completion_ids"][0][0] ^= 1
    for name, text in {
        "token": json.dumps(first) + "\n" + "".join(rows[1:]),
        "order": "".join([rows[1], rows[0], *rows[2:]]),
        "more": "".join([*rows, json.dumps(first) + "\n"]),
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        assert exit_code(changed(dead, data__train=[SourceConfig(str(path))])) == 2, name
        assert error_lines(capsys.readouterr().err)[0].startswith("error: CONFIG: data.train: cannot resume from "), (
            name
        )
    assert exit_code(changed(dead, data__max_length=20, data__max_prompt_length=15)) == 2
    assert error_lines(capsys.readouterr().err)[0].startswith("error: CONFIG: data.train: cannot resume from ")


def test_another_share_of_a_source_is_refused(dead: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """By the key of the share, where it gives an epoch other pairs; weight 1 gives the same as null and goes on."""
    path, checkpoint = dead.data.train[0].path, checkpoint_path(Path(str(dead.train.run_dir)), 4)
    for share, line in (({"weight": 0.5}, "weight: {}: null {}, 0.5 now"), ({"count": 9}, "count: {}: null {}, 9 now")):
        assert exit_code(changed(dead, data__train=[SourceConfig(path, **share)])) == 2
        (error,) = error_lines(capsys.readouterr().err)
        line = line.format(f"cannot resume from {checkpoint}", "when the checkpoint was written")
        assert error.startswith(f"error: CONFIG: data.train[0].{line}, which gives an epoch other pairs; valid: ")
    assert exit_code(changed(dead, data__train=[SourceConfig(path, weight=1.0)])) == 0


def test_another_reference_is_refused(dead: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """reference.path, and model.path where it is the reference: other weights, whatever the folder's name."""
    save_model(tmp_path / "other", "llama", seed=1)
    for key in ("model__path", "reference__path"):
        assert exit_code(changed(dead, **{key: str(tmp_path / "other")})) == 2
        (error,) = error_lines(capsys.readouterr().err)
        assert error.startswith("error: CONFIG: reference.path: cannot resume from ")
        assert "has changed since the checkpoint was written" in error


def test_the_same_content_elsewhere_is_the_same_run(dead: Config, dead_root: Path, tmp_path: Path) -> None:
    """Data, model and cache under other names."""
    shutil.copytree(dead_root / "model", tmp_path / "model")
    shutil.copyfile(dead_root / "pairs.jsonl", tmp_path / "renamed.jsonl")
    moved = changed(
        dead, model__path=str(tmp_path / "model"), data__train=[SourceConfig(str(tmp_path / "renamed.jsonl"))]
    )
    run_dir = run(changed(moved, reference__cache_dir=str(tmp_path / "cache")))
    whole = run(six_steps(dead_root, tmp_path / "whole"))
    assert same_weights(whole / "final", run_dir / "final")
    assert len(read_rows(next((tmp_path / "cache").iterdir()))) == 2 * (8 + 2)


def changes_logged(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Without that of the run folder, which these tests copied."""
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed since the checkpoint: ")]
    keys = sorted(line.removeprefix("changed since the checkpoint: ") for line in said)
    return [key for key in keys if not key.startswith("train.run_dir: ")]


def test_the_rest_may_change_and_is_logged(dead: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Each change as KEY: before -> now, and nothing that did not change."""
    config = changed(
        dead,
        optim__lr=2e-3,
        optim__weight_decay=0.5,
        train__eval_every=2,
        data__eval=[],
        batch__tokens_per_micro_batch=50,
        checkpoint__keep=1,
        parallel__activation_checkpointing="full",
        parallel__sync_gradients="every_micro_batch",  # what auto became in the run before
        parallel__compile=False,
    )
    run(config)
    assert changes_logged(capsys) == [
        "batch.tokens_per_micro_batch: 16384 -> 50",
        "checkpoint.keep: None -> 1",
        f"data.eval: {[dataclasses.asdict(source) for source in dead.data.eval]} -> []",
        "optim.lr: 0.001 -> 0.002",
        "optim.weight_decay: 0.0 -> 0.5",
        "parallel.activation_checkpointing: none -> full",
        "parallel.compile: auto -> False",
        "train.eval_every: 3 -> 2",
    ]
    written = load_config(["--config", str(Path(str(dead.train.run_dir)) / "config.yaml")], "dpo.train")
    assert written == config


def test_nothing_changed_is_nothing_logged(dead: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run(dead)
    assert changes_logged(capsys) == []


def test_a_broken_config_file_of_the_run_does_not_hinder_it(dead: Config) -> None:
    path = Path(str(dead.train.run_dir)) / "config.yaml"
    path.write_text(path.read_text()[:50])
    run(dead)
    decided = {"parallel__activation_checkpointing": "none", "parallel__sync_gradients": "every_micro_batch"}
    assert load_config(["--config", str(path)], "dpo.train") == changed(dead, **decided)


# --- a key of the loss that is newer than the checkpoint -------------------------------------------------------------

DEFAULTS = {
    "loss.name": "dpo",
    "loss.beta": 0.1,
    "loss.label_smoothing": 0.0,
    "loss.length_normalized": False,
    "loss.sft_weight": 0.0,
    "loss.gamma": 0.5,
    "loss.dpop_lambda": 50.0,
}
OF_OTHER_LOSSES = ("loss.gamma", "loss.dpop_lambda")
"""Keys that the loss of these runs does not take, so that another value is refused for that."""


def forget(config: Config, key: str) -> None:
    """Takes a key out of what the run's checkpoints record, as if it had not existed when they were written; the
    inventory of each checkpoint is brought in line.
    """
    for path in (Path(str(config.train.run_dir)) / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        assert state["identity"].pop(key) == DEFAULTS[key]
        path.write_text(json.dumps(state))
        marker, content = path.with_name("COMPLETE"), path.read_bytes()
        files = json.loads(marker.read_text()) | {path.name: [len(content), hashlib.sha256(content).hexdigest()]}
        marker.write_text(json.dumps(files))


def test_defaults_of_the_loss_by_hand() -> None:
    assert {f"loss.{name}": value for name, value in dataclasses.asdict(LossConfig()).items()} == DEFAULTS


def test_a_new_key_at_its_default_goes_on(
    dead: Config, dead_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all keys unknown to the checkpoint at once; to the last bit as if they had been there."""
    for key in DEFAULTS:
        forget(dead, key)
    assert find_start(dead).step == 4
    whole = run(six_steps(dead_root, tmp_path / "whole"))
    assert same_weights(whole / "final", run(dead) / "final")
    assert f"resumes from {checkpoint_path(Path(str(dead.train.run_dir)), 4)}" in capsys.readouterr().err


@pytest.mark.parametrize("key", [key for key in DEFAULTS if key not in OF_OTHER_LOSSES])
def test_a_new_key_at_another_value_is_refused(dead: Config, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that does not know the key was made with its default."""
    forget(dead, key)
    assert exit_code(changed(dead, **IDENTITY[key])) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert error.startswith(
        f"error: CONFIG: {key}: cannot resume from {checkpoint_path(Path(str(dead.train.run_dir)), 4)}"
    )
    (value,) = IDENTITY[key].values()
    assert f": {DEFAULTS[key]!r} when the checkpoint was written, {value!r} now; " in error
