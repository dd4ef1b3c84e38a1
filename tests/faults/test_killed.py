"""`kill -9` of a real process, in the middle of the reference pass and in the middle of training: the run goes on."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dpo.checkpoint.folders import checkpoint_path
from dpo.config import Config, to_yaml
from dpo.run_folder.holder import holder_in, is_running
from tests.support.checkpoints import newest_checkpoint
from tests.support.models import save_model, save_pairs
from tests.support.processes import start_program
from tests.support.runs import (
    has_log_alone,
    logged,
    make_config,
    reference_line,
    run,
    same_weights,
    train_lines,
    without_clock,
)

NUM_PAIRS = 12
HELD_REFERENCE = """
import threading
from dpo.ref_logps import fill as reference_pass
whole, calls = reference_pass._run, []
def run_or_hold(*args):
    calls.append(1)
    return threading.Event().wait() if len(calls) == 6 else whole(*args)
reference_pass.SECONDS_BETWEEN_BLOCKS = 0
reference_pass._chunks = lambda items, tokens: ([item] for item in items)
reference_pass._run = run_or_hold
"""
"""A block a completion; the sixth is never computed."""
HELD_TRAINING = """
import threading
from dpo.train import loop
step = loop._step
loop._step = lambda run, number, *others: threading.Event().wait() if number == 6 else step(run, number, *others)
"""
"""Step 6 never begins."""
HELD_WRITING = """
import threading
from dpo.checkpoint import store as checkpoint
from dpo.checkpoint import saver as saving
write, held = saving.write_checkpoint, checkpoint.{name}
def hold(*args):
    (args[0].parent / "held").touch()
    threading.Event().wait()
def write_or_hold(shelf, state, *others):
    checkpoint.{name} = hold if state.step == 4 else held
    write(shelf, state, *others)
saving.write_checkpoint = write_or_hold
"""
"""The thread that writes the checkpoint of step 4 comes to a function and goes no further."""
MAIN = """
import sys
from dpo.distributed.program import run_program
from dpo.train.program import main
sys.exit(run_program(main))
"""
TORCHRUN = """
import os, threading
if os.fork():
    threading.Event().wait()
os.environ["TORCHELASTIC_RUN_ID"] = "none"
"""
"""What follows is a rank, whose parent does nothing."""


pytestmark = pytest.mark.xdist_group("killed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl, and whole/, the run that nobody killed."""
    root = tmp_path_factory.mktemp("killed")
    save_model(root / "model", "llama")
    save_pairs(root / "pairs.jsonl", NUM_PAIRS)
    run(nine_steps(root, root / "whole", reference__cache_dir=str(root / "cache")))
    return root


@pytest.fixture
def config(folders: Path, tmp_path: Path) -> Config:
    return nine_steps(folders, tmp_path / "run")


def nine_steps(folders: Path, run_dir: Path, **changes: object) -> Config:
    """Nine steps of four of twelve pairs, a checkpoint every second."""
    return make_config(
        folders / "model",
        folders / "pairs.jsonl",
        run_dir,
        batch__pairs_per_step=4,
        train__steps=9,
        optim__lr=1e-3,
        optim__warmup_steps=0,
        checkpoint__save_every=2,
        **changes,
    )


def kill_when(config: Config, slowed: str, is_time: Callable[[], bool]) -> None:
    """Trains in a process of its own, and kills it as soon as `is_time()`."""
    path = Path(str(config.train.run_dir)).with_suffix(".yaml")
    path.write_text(to_yaml(config))
    process = start_program(slowed + MAIN, ["--config", str(path)], path.with_suffix(".stderr"))
    try:
        end = time.monotonic() + 120
        while not is_time():
            assert process.is_alive(), path.with_suffix(".stderr").read_text()[-2000:]
            assert time.monotonic() < end, "the process does nothing"
            time.sleep(0.02)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def assert_equal(run_dir: Path, whole: Path) -> None:
    """Metrics and weights, to the last bit."""
    assert without_clock(train_lines(run_dir)) == without_clock(train_lines(whole))
    assert same_weights(run_dir / "final", whole / "final")


def test_a_killed_reference_pass_goes_on(config: Config, tmp_path: Path) -> None:
    """Killed when five of 24 rows are there, none of which is computed twice."""
    cache = tmp_path / "reference-cache"
    kill_when(config, HELD_REFERENCE, lambda: len(list(cache.rglob("rows-*"))) == 5)
    assert has_log_alone(tmp_path / "run") and logged(tmp_path / "run")[0].startswith("data: reading")
    assert reference_line(run(config)) == (2 * NUM_PAIRS - 5, 5)


def test_a_killed_training_goes_on_to_the_last_bit(config: Config, folders: Path, tmp_path: Path) -> None:
    """Killed after step 5, when the checkpoint of step 4 is the newest, or is being written still."""
    kill_when(config, HELD_TRAINING, lambda: len(train_lines(tmp_path / "run")) == 5)
    assert_equal(run(config), folders / "whole")


def test_a_killed_torchrun_leaves_no_rank(config: Config, folders: Path, tmp_path: Path) -> None:
    """The rank would hold the run folder, and train on. The same start again is not refused."""
    kill_when(config, TORCHRUN + HELD_TRAINING, lambda: len(train_lines(tmp_path / "run")) == 5)
    (lock,) = (tmp_path / "run/lock").glob("*.json")
    holder = holder_in(lock.read_bytes())
    assert holder is not None
    try:
        end = time.monotonic() + 120
        while is_running(holder.pid, holder.started):
            assert time.monotonic() < end, "the rank runs on"
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.kill(holder.pid, signal.SIGKILL)
    assert_equal(run(config), folders / "whole")


@pytest.mark.parametrize("function", ["_make_draft", "_commit", "write_marker"])
def test_killed_while_a_checkpoint_is_written(config: Config, folders: Path, tmp_path: Path, function: str) -> None:
    """Training is past step 4, whose checkpoint is nothing yet, or all files but state.json and the marker, or all but
    the marker: the run goes on from step 2, and no draft stays.
    """
    checkpoints = tmp_path / "run/checkpoints"
    is_held = checkpoints / "held"

    def is_time() -> bool:
        return is_held.exists() and len(train_lines(tmp_path / "run")) >= 5

    kill_when(config, HELD_WRITING.format(name=function), is_time)
    is_held.unlink()
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {"step-000002"} | ({"step-000004.tmp"} if function != "_make_draft" else set())
    assert newest_checkpoint(tmp_path / "run") == checkpoint_path(tmp_path / "run", 2)
    assert_equal(run(config), folders / "whole")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000008", "step-000009"]
