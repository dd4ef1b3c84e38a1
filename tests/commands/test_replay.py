"""`python -m dpo.replay`: equal where nothing happened, and the first step that differs where a bit has flipped."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dpo.base.sums import sha256_of
from dpo.checkpoint import marker
from dpo.checkpoint.folders import checkpoint_path
from dpo.checkpoint.state import read_state
from dpo.config import Config, load_config, to_yaml
from dpo.replay import program as replay
from dpo.replay.beginning import layouts_of
from dpo.replay.comparison import MEASURED, describe, differences, table
from dpo.run_folder.files import METRICS
from dpo.train import loop
from tests.support.ranks import Ranks
from tests.support.runs import changed, error_lines, exit_code_of, run, run_until, save_six_steps, six_steps, snapshot

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_six_steps(tmp_path_factory.mktemp("replay"))


@pytest.fixture(scope="module")
def alone(root: Path, ranks: Ranks) -> Path:
    """A run on one rank, and `pair`, the same on two."""
    return ranks(1, run, config_of(root, root / "alone"))[0]


@pytest.fixture(scope="module")
def pair(root: Path, ranks: Ranks) -> Path:
    return ranks(2, run, config_of(root, root / "pair"))[0]


def config_of(root: Path, run_dir: Path, **changes: Any) -> Config:
    """Two micro-batches a step on each of two ranks."""
    return six_steps(root, run_dir, batch__tokens_per_micro_batch=60, **changes)


def again(folder: Path, step: int, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m dpo.replay` on one rank."""
    code = exit_code_of(replay.main, "dpo.replay", str(folder), "--step", str(step), *words)
    said = capsys.readouterr()
    return code, said.out, said.err


def as_rank(folder: Path, step: int) -> tuple[int, str, str]:
    """The same on a rank of several."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code_of(replay.main, "dpo.replay", str(folder), "--step", str(step))
    return code, out.getvalue(), err.getvalue()


# --- equal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "first"), [(1, 1), (3, 3), (6, 5)])
def test_an_undisturbed_run_is_equal(alone: Path, capsys: pytest.CaptureFixture[str], step: int, first: int) -> None:
    """From step 0, and from the checkpoint after 2 or 4; the folder stays as it is, to its times."""
    before = snapshot(alone)
    code, out, err = again(alone, step, capsys)
    assert code == 0, err
    assert snapshot(alone) == before
    *rows, result = out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == [str(number) for number in range(first, step + 1)]
    assert all(row.endswith("  equal") for row in rows)
    assert result.startswith(f"steps {first} to {step} are equal to the last bit; the weights are ")
    checkpoint = checkpoint_path(alone, step)
    if checkpoint.exists():
        assert result.endswith(f"those of {checkpoint}, {read_state(checkpoint, '').weights}")
    else:
        assert result.endswith(f"not compared: {checkpoint} has no hash of them, or is not there")


def test_two_ranks_are_equal_to_two_ranks(pair: Path, ranks: Ranks) -> None:
    (code, out, err), other = ranks(2, as_rank, pair, 4)
    assert code == 0, err
    assert "steps 3 to 4 are equal to the last bit; the weights are those of " in out
    assert other == (0, "", "")


def test_a_run_that_was_resumed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in step 4, it goes on from 2: provenance.json tells where each start began."""
    config = config_of(root, tmp_path / "run")
    run_until(config, 4)
    run(config)
    starts = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert [start["first_step"] for start in starts] == [1, 3]
    code, _, err = again(tmp_path / "run", 6, capsys)
    assert code == 0 and "of an earlier start" not in err
    code, _, err = again(tmp_path / "run", 1, capsys)
    told = "steps before 3 are of an earlier start; they are computed by the config of the last one, too"
    assert code == 0 and told in err


def test_the_hash_of_the_weights_is_that_of_any_layout(alone: Path, pair: Path, ranks: Ranks, root: Path) -> None:
    """A learning rate of next to nothing: after a step, one and two ranks have the weights of the model."""
    hashes = set()
    for size in (1, 2):
        name = root / f"still-{size}"
        ranks(size, run, config_of(root, name, optim__lr=1e-30, optim__name="sgd", train__steps=1))
        hashes.add(read_state(checkpoint_path(name, 1), "").weights)
    assert len(hashes) == 1 and None not in hashes
    assert read_state(checkpoint_path(alone, 4), "").weights != read_state(checkpoint_path(alone, 2), "").weights


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("keys", [{}, {"lora__dora": True}, {"lora__train_embeddings": True}])
def test_a_run_with_adapters(root: Path, ranks: Ranks, tmp_path: Path, keys: dict[str, Any], size: int) -> None:
    """From step 0 and from a checkpoint, which holds adapters alone; weights and metrics to the last bit."""
    config = config_of(root, tmp_path / "run", lora__rank=3, **keys)
    folder, *_ = ranks(size, run, config)
    (folder / "final" / "adapter_model.safetensors").unlink()  # nothing is read from there
    for step in (2, 6):
        code, out, err = ranks(size, as_rank, folder, step)[0]
        assert code == 0, err
        first = {2: 1, 6: 5}[step]
        weights = read_state(checkpoint_path(folder, step), "").weights
        assert f"steps {first} to {step} are equal to the last bit; the weights are those of " in out
        assert out.rstrip().endswith(f", {weights}") and "the code has changed" not in err


def test_a_flipped_bit_of_an_adapter_is_found(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In memory, after step 3: step 4 is the first that differs."""
    name = "model.layers.1.mlp.down_proj.lora_B.default.weight"
    folder = run_with_a_flip(config_of(root, tmp_path / "run", lora__rank=3), "_step", 4, 12, name)
    code, _, err = again(folder, 4, capsys)
    (line,) = error_lines(err)
    assert code == 1 and line.startswith("error: step 4 is the first that differs: train/")


# --- a flipped bit ---------------------------------------------------------------------------------------------------


def flip(weight: torch.Tensor, bit: int) -> None:
    """Flips a bit of the element of a weight that is largest, in memory."""
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    flat = local.detach().view(-1)
    flat.view(torch.int32)[int(flat.abs().argmax())] ^= 2**bit


DOWN = "model.layers.1.mlp.down_proj.weight"


def run_with_a_flip(config: Config, name: str, when: int, bit: int, weight: str = DOWN) -> Path:
    """Trains; before the `when`-th call of a function of the loop, a bit of a weight flips on the last rank."""
    function, calls = getattr(loop, name), []

    def call(made: Any, *others: Any) -> Any:
        calls.append(1)
        if len(calls) == when and os.environ.get("RANK", "0") == str(made.world.size - 1):
            flip(made.policy.model.get_parameter(weight), bit)
        return function(made, *others)

    with patch.object(loop, name, call):
        return run(config)


@pytest.mark.parametrize(("size", "bit"), [(1, 22), (2, 22), (2, 12)])
def test_a_flipped_bit_is_found(root: Path, ranks: Ranks, tmp_path: Path, size: int, bit: int) -> None:
    """In memory, after step 3. The run's checkpoint after 2 is whole, so that step 4 is the first that differs."""
    folder, *_ = ranks(size, run_with_a_flip, config_of(root, tmp_path / "run"), "_step", 4, bit)
    code, out, err = ranks(size, as_rank, folder, 4)[0]
    (line,) = error_lines(err)
    assert code == 1 and line.startswith("error: step 4 is the first that differs: train/")
    assert [row.split("  ")[-1].split(":")[0] for row in out.splitlines()[1:]] == ["equal", "differs"]
    assert ranks(size, as_rank, folder, 3)[0][0] == 0


def test_the_lowest_bit_of_a_weight_that_no_metric_shows(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It flips between step 4 and its checkpoint, the second one: the hash tells."""
    folder = run_with_a_flip(config_of(root, tmp_path / "run"), "_save", 2, 0)
    code, out, err = again(folder, 4, capsys)
    assert code == 1 and out.count("  equal") == 2
    weights = read_state(checkpoint_path(folder, 4), "").weights
    (line,) = error_lines(err)
    assert line.startswith("error: all metrics of steps 3 to 4 are equal, but the weights after step 4 have the hash ")
    assert line.endswith(f"those of {checkpoint_path(folder, 4)} {weights}")


# --- another layout --------------------------------------------------------------------------------------------------


def test_another_number_of_ranks(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = again(pair, 4, capsys)
    assert code == 0, err
    assert "the layout of the run differs in devices: the losses are compared to 1e-05 of them, and nothing else" in err
    assert "steps 3 to 4 are equal in their losses to 1e-05; the weights are not compared: on another layout" in out


# --- what is wrong with the folder -----------------------------------------------------------------------------------


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = again(tmp_path, 1, capsys)
    assert code == 2
    assert error_lines(err) == [f"error: command line: RUN: {tmp_path}/config.yaml is missing; valid: a run folder"]


def hashed_files(folder: Path, step: int) -> tuple[int, set[str], str]:
    """Exit code, the files of checkpoints that this rank hashes, as `step-000002/state.json`, and stderr."""
    hashed: set[str] = set()

    def noted(path: Path) -> str:
        hashed.add(f"{path.parent.name}/{path.name}")
        return sha256_of(path)

    with patch.object(marker, "sha256_of", noted):
        code, _, err = as_rank(folder, step)
    return code, hashed, err


def test_the_ranks_share_the_check_of_the_start(pair: Path, ranks: Ranks) -> None:
    """Each hashes its own part of the start. Of the checkpoint after the last step, `state.json` alone is read."""
    (code, main, err), (_, other, _) = ranks(2, hashed_files, pair, 4)
    assert code == 0, err
    assert main == {f"step-000002/{name}" for name in (".metadata", "state.json", "__0_0.distcp")} | {
        "step-000004/state.json"
    }
    assert other == {"step-000002/__1_0.distcp"}


def test_damaged_checkpoints_are_told(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The only one before the steps is skipped, from step 0 then; the hash of one that has changed is not believed."""
    folder = Path(shutil.copytree(alone, tmp_path / "run"))
    for step in (2, 4):
        state = checkpoint_path(folder, step) / "state.json"
        state.write_bytes(state.read_bytes().replace(b"0", b"1", 1))
    code, out, err = again(folder, 4, capsys)
    assert code == 0, err
    assert f"checkpoint {checkpoint_path(folder, 2)} is skipped: state.json has changed" in err
    assert f"checkpoint {checkpoint_path(folder, 4)} is not compared: state.json has changed" in err
    assert "steps 1 to 4 are equal to the last bit; the weights are not compared" in out


def test_a_run_asks_for_no_code_by_itself(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The config of a run folder may be anybody's: the code of a model's repository runs where the command line says
    so too.
    """
    folder = Path(shutil.copytree(alone, tmp_path / "run"))
    config = load_config(["--config", str(folder / "config.yaml")], "dpo.replay")
    (folder / "config.yaml").write_text(to_yaml(changed(config, model__trust_remote_code=True)))
    code, _, err = again(folder, 2, capsys)
    assert code == 2
    (line,) = error_lines(err)
    assert line.startswith("error: command line: RUN: ")
    assert f"runs the code of the repository {config.model.path}; valid: with --trust-remote-code" in line
    assert again(folder, 2, capsys, "--trust-remote-code")[0] == 0


def test_a_step_that_the_run_has_not(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = again(alone, 7, capsys)
    assert code == 2
    assert error_lines(err) == [f"error: command line: --step: {alone}/metrics.jsonl has no step 7; valid: 1 to 6"]


def test_a_lost_line_a_changed_number_and_a_hash_that_is_missing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of step 3 that is gone is told, as is a number of step 4 that somebody has changed."""
    with patch("dpo.checkpoint.store.fingerprint", lambda *_: None):  # as before there were hashes
        folder = run(config_of(root, tmp_path / "run"))
    code, out, _ = again(folder, 4, capsys)
    assert code == 0 and "the weights are not compared: " in out
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    (folder / METRICS).write_text("".join(line for line in lines if not line.startswith('{"step": 3, "train/')))
    code, _, err = again(folder, 4, capsys)
    assert code == 1
    assert error_lines(err) == ["error: step 3 is the first that differs: metrics.jsonl has no line of it"]
    found = [json.loads(line) for line in lines]
    changed = next(line for line in found if line["step"] == 4)
    changed["train/rewards/margins"] *= 1 + 2**-50
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in found))
    code, _, err = again(folder, 4, capsys)
    assert code == 1
    assert error_lines(err)[0].startswith("error: step 4 is the first that differs: train/rewards/margins is ")


def test_data_that_has_changed_since(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and the key: nothing is wrong with the steps."""
    made = save_six_steps(tmp_path)
    folder = run(config_of(made, tmp_path / "run"))
    lines = (made / "pairs.jsonl").read_text().splitlines(keepends=True)
    (made / "pairs.jsonl").write_text("".join(reversed(lines)))
    code, _, err = again(folder, 4, capsys)
    assert code == 2 and "data.train: cannot resume from " in error_lines(err)[0]


# --- pure functions --------------------------------------------------------------------------------------------------

LINE = {"train/loss": 0.5, "train/grad_norm": 2.0, **dict.fromkeys(MEASURED, 1.0)}


def test_differences_to_the_last_bit() -> None:
    other = LINE | {"train/grad_norm": 2.0000000000000004, "train/mfu": 0.3, "train/lr": 1.0}
    assert differences(LINE, LINE | dict.fromkeys(MEASURED, 7.0), True) == []
    assert differences(LINE, other, True) == ["train/grad_norm", "train/lr"]
    assert differences({"train/lr": 1.0}, {"train/lr": 1.0}, True) == [], "a loss that is not finite, twice"
    assert differences(None, LINE, True) == ["no line"]


@pytest.mark.parametrize(("loss", "differs"), [(0.5 * (1 + 0.9e-5), False), (0.5 * (1 + 1.1e-5), True), (None, True)])
def test_differences_on_another_layout(loss: float | None, differs: bool) -> None:
    other = {"train/loss": loss, "train/grad_norm": 9.0} if loss else {"train/grad_norm": 9.0}
    assert (differences(LINE, other, False) == ["train/loss"]) is differs


def test_the_words_of_a_difference() -> None:
    names = ["train/loss", "train/grad_norm"]
    told = "train/loss is 0.5 in metrics.jsonl and not finite again, and 1 more"
    assert describe(LINE, {}, names) == told


def test_a_long_table_shows_its_ends_and_the_first_difference() -> None:
    rows = [(step, LINE, LINE, ["train/loss"] if step >= 50 else []) for step in range(1, 101)]
    shown = [line.split()[0] for line in table(rows)[1:]]
    assert shown == ["1", "2", "3", "…", "48", "49", "50", "51", "52", "…", "98", "99", "100"]


def test_the_layouts_of_a_step() -> None:
    """Two starts, the second from step 7 on; starts of an older version do not tell, so that each may be it."""
    one, two = {"devices": {"cpu": 1}}, {"devices": {"cpu": 2}}
    told = [{"first_step": 1, "layout": one}, {"first_step": 7, "layout": two}]
    assert [layouts_of(told, step) for step in (6, 7)] == [[one], [two]]
    assert layouts_of([{"layout": one}, {"layout": two}], 3) == [one, two]
    assert layouts_of([{"layout": one}, *told[1:]], 3) == [one]
    assert layouts_of([{"layout": one}, *told[1:]], 9) == [two]
    assert layouts_of([{}], 1) == []
