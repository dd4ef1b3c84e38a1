"""`python -m dpo.doctor --report`: real runs on one and two ranks, what the file must not hold, and steps that fail."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig

from dpo.base.errors import RunError
from dpo.doctor import program, steps
from dpo.doctor.report import _model
from dpo.estimate import program as estimate
from dpo.estimate.report import Report
from dpo.estimate.report_file import read_report
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import error_lines, exit_code_of

MARKER = "zebra"
"""A word of every name and path of the machine and the config, which the file must not hold."""


def save(root: Path) -> list[str]:
    """Writes a model and pairs under names with the marker; returns the keys of a config of them."""
    folder = root / MARKER
    save_model(folder / f"{MARKER}-model", "llama")
    save_pairs(folder / f"{MARKER}-pairs.jsonl", 8)
    keys = {
        "model.path": folder / f"{MARKER}-model",
        "data.train": f"[{{path: {folder / f'{MARKER}-pairs.jsonl'}, format: tokens}}]",
        "train.run_dir": folder / f"{MARKER}-run",
        "reference.cache_dir": folder / f"{MARKER}-cache",
        "batch.pairs_per_step": 2,
    }
    return [f"--{key}={value}" for key, value in keys.items()]


def doctor(keys: list[str], file: Path) -> int:
    """The exit code of the program in this process."""
    with patch.dict(os.environ):  # it says where kernels are kept
        return exit_code_of(program.main, "dpo.doctor", *keys, "--report", str(file))


def test_the_file_holds_no_name_path_or_data(tmp_path: Path) -> None:
    """The host, the user, every folder and file, the home of the hub, and the text of a failure carry the marker."""
    names = {name: f"/{MARKER}/{name}" for name in ("USER", "LOGNAME", "HOME", "HF_HOME", "DPO_CACHE", "TMPDIR")}
    file = tmp_path / f"{MARKER}.json"
    fails = patch("dpo.doctor.storage.timed_write", side_effect=RunError(f"{MARKER} is full"))
    host = patch("socket.gethostname", lambda: f"{MARKER}-host")
    keys = save(tmp_path)
    with patch.dict(os.environ, names), host, fails:
        assert doctor(keys, file) == 1
    assert MARKER not in file.read_text().lower()
    report = read_report(str(file))
    assert report.failed == ["run folder", "cache"] and report.storage is None
    assert report.outcome == "measured" and report.lengths.source == "data"
    assert not (tmp_path / MARKER / f"{MARKER}-run").exists()


def test_an_architecture_that_came_with_the_model_is_not_named() -> None:
    class Ours(LlamaConfig):
        model_type = MARKER

    assert _model(LlamaConfig(), 1).family == "llama" and _model(Ours(), 1).family == "other"


def test_the_steps_are_those_of_the_config(tmp_path: Path) -> None:
    """Llama of 2 layers and 97 tokens: (32 x 32 x 2 + 32 x 16 x 2 + 3 x 32 x 48 + 2 x 32) x 2 + 97 x 32 x 2 + 32."""
    keys = [*save(tmp_path), "--optim.name=adamw", "--batch.tokens_per_micro_batch=64"]
    assert doctor(keys, tmp_path / "r.json") == 0
    report = read_report(str(tmp_path / "r.json"))
    model, layout, timed = report.model, report.layout, report.steps
    assert model.parameters == 2 * (2048 + 1024 + 4608 + 64) + 6208 + 32
    assert (model.family, model.layers, model.hidden_size, model.heads, model.kv_heads) == ("llama", 2, 32, 4, 2)
    assert layout is not None and timed is not None
    assert (layout.optimizer, layout.tokens_per_micro_batch, layout.pairs_per_step) == ("adamw", 64, 2)
    assert layout.compute_dtype == "float32" and "auto" not in (tmp_path / "r.json").read_text()
    assert len(timed.seconds) == 5 and timed.elements_per_rank == model.parameters
    assert timed.flops == timed.slowest_flops and timed.all_gather_bytes == 0  # one rank
    assert report.lengths.trees_per_step.p100 == 2 and report.lengths.completions_per_step.p50 == 4
    assert report.lengths.prompt_tokens.p100 <= 24 and report.lengths.completion_tokens.p100 <= 16
    assert {(update.optimizer, update.momentum) for update in report.updates} == {
        (name, momentum > 0) for name, momentum in steps.VARIANTS
    }
    assert exit_code_of(estimate.main, "dpo.estimate", *keys, "--measured", str(tmp_path / "r.json")) == 0


def test_the_real_step_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train_step` runs two times before five, on the planned rows, each with the reference's log-probabilities."""
    seen: list[Any] = []
    real = steps.train_step

    def watched(policy: Any, optimizer: Any, batches: Any, *others: Any) -> Any:
        seen.append((sum(batch.num_tokens for batch in batches), batches[0].ref_logps is not None))
        return real(policy, optimizer, batches, *others)

    monkeypatch.setattr(steps, "train_step", watched)
    assert doctor(save(tmp_path), tmp_path / "r.json") == 0
    timed = read_report(str(tmp_path / "r.json")).steps
    assert timed is not None and len(seen) == 2 + 5 and all(has_reference for _, has_reference in seen)
    assert [tokens for tokens, _ in seen[2:]] == timed.tokens


def outcome_of(tmp_path: Path, target: str, value: Any) -> Report:
    """The report with something of `steps` replaced, of which an estimate must be possible."""
    keys, file = save(tmp_path), tmp_path / "r.json"
    with patch.object(steps, target, value):
        doctor(keys, file)
    assert exit_code_of(estimate.main, "dpo.estimate", *keys, "--measured", str(file)) == 0
    return read_report(str(file))


def test_a_model_that_does_not_fit_is_told_and_the_rest_is_there(tmp_path: Path) -> None:
    """A megabyte is free."""
    report = outcome_of(tmp_path, "free_on_device", lambda world: 1e6)
    assert (report.outcome, report.steps, report.failed) == ("does_not_fit", None, [])
    assert report.products and report.storage and report.layout and report.attention


def test_memory_that_does_not_suffice(tmp_path: Path) -> None:
    def exhausted(*args: Any) -> None:
        raise torch.OutOfMemoryError

    report = outcome_of(tmp_path, "train_step", exhausted)
    assert (report.outcome, report.steps, report.failed) == ("out_of_memory", None, [])


def test_steps_that_fail(tmp_path: Path) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    report = outcome_of(tmp_path, "train_step", broken)
    assert (report.outcome, report.steps, report.failed, report.layout) == ("failed", None, ["steps"], None)
    assert report.products


def test_steps_without_an_estimate_are_timed_with_what_needs_the_least_memory(tmp_path: Path) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    report = outcome_of(tmp_path, "choice_here", broken)
    assert report.outcome == "measured" and report.layout is not None
    assert (report.layout.activation_checkpointing, report.layout.sync_gradients) == ("full", "every_micro_batch")


def test_a_process_that_ends_in_the_steps_leaves_the_rest(tmp_path: Path) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    keys, file = save(tmp_path), tmp_path / "r.json"
    with patch.object(steps, "train_step", killed):
        assert doctor(keys, file) == 130
    report = read_report(str(file))
    assert report.outcome == "not_finished" and report.products and not report.updates


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--report", "r.json"], "--report: needs a config, whose steps are timed; valid: --config FILE"),
        (["--model.path", "m", "--report", "/"], "--report: / is a folder; valid: --config FILE"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(program.main, "dpo.doctor", *words) == 2
    assert error_lines(capsys.readouterr().err)[-1] == f"error: command line: {message} --report REPORT.json"


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not after minutes of measurements, which would be lost."""
    (tmp_path / "file").touch()
    assert doctor(save(tmp_path), tmp_path / "file" / "r.json") == 2
    shown = capsys.readouterr()
    what = f"{tmp_path}/file/r.json: cannot write to {tmp_path}/file"
    assert error_lines(shown.err)[-1] == f"error: command line: --report: {what}; valid: a file in a folder to write in"
    assert shown.out == ""


def report_on_a_rank(keys: list[str], file: str) -> int:
    """The program on a rank."""
    torch.set_num_threads(1)
    return doctor(keys, Path(file))


@pytest.mark.xdist_group("ranks")
def test_two_ranks_are_in_one_file(ranks: Ranks, tmp_path: Path) -> None:
    """Of the weights of 21,728 x 4 bytes half is sent; a rank has half of the parameters."""
    keys = save(tmp_path)
    assert ranks(2, report_on_a_rank, keys, str(tmp_path / "r.json")) == [0, 0]
    report = read_report(str(tmp_path / "r.json"))
    assert (report.ranks.ranks, report.ranks.nodes, report.ranks.ranks_per_node) == (2, 1, 2)
    assert all(len(products.flops_per_second) == 2 for products in report.products)
    assert [(c.kind, c.axis, c.ranks) for c in report.collectives] == [
        ("all_gather", "shard", 2),
        ("reduce_scatter", "shard", 2),
    ]
    timed = report.steps
    assert timed is not None and timed.reduced_bytes >= 4 * report.model.parameters
    assert timed.reduce_scatter_bytes == timed.reduced_bytes  # a micro-batch a step
    assert report.model.parameters / 2 <= timed.elements_per_rank < report.model.parameters / 2 + 100
    assert len(timed.peak_memory_bytes) == 2 and timed.flops[0] > timed.slowest_flops[0]
