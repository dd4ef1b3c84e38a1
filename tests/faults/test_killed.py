"""`kill -9` of a real process, in the middle of the reference pass and in the middle of training: the run goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.checkpoint.store import checkpoint_path, newest_checkpoint
from dpo.config import Config, to_yaml
from tests.support.models import save_model, save_pairs
from tests.support.runs import changed, make_config, reference_line, run, same_weights, train_lines, without_clock

NUM_PAIRS = 12
SLOW_REFERENCE = """
import time
from dpo.ref_logps import fill as reference_pass
whole = reference_pass._run
reference_pass.SECONDS_BETWEEN_BLOCKS = 0
reference_pass._chunks = lambda items, tokens: ([item] for item in items)
reference_pass._run = lambda *args: (whole(*args), time.sleep(0.2))[0]
"""
"""A block a completion, five a second."""
SLOW_TRAINING = """
import time
from dpo import train
from dpo.run import loop
step = loop._step
loop._step = lambda *args: (time.sleep(0.3), step(*args))[1]
"""
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
from dpo.train import main
sys.exit(run_program(main))
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Nine steps of four of twelve pairs, a checkpoint every second."""
    return make_config(
        save_model(tmp_path / "model", "llama"),
        save_pairs(tmp_path / "pairs.jsonl", NUM_PAIRS),
        tmp_path / "run",
        batch__pairs_per_step=4,
        train__steps=9,
        optim__lr=1e-3,
        optim__warmup_steps=0,
        checkpoint__save_every=2,
    )


def kill_when(config: Config, slowed: str, is_time: Callable[[], bool]) -> None:
    """Trains in a process of its own, and kills it as soon as `is_time()`."""
    path = Path(str(config.train.run_dir)).with_suffix(".yaml")
    path.write_text(to_yaml(config))
    command = [sys.executable, "-c", slowed + MAIN, "--config", str(path)]
    threads = {"OMP_NUM_THREADS": "1"}  # as here: equal to the last bit is promised for as many threads
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | threads)
    try:
        end = time.monotonic() + 120
        while not is_time():
            assert process.poll() is None, process.communicate()[1].decode()[-2000:]
            assert time.monotonic() < end, "the process does nothing"
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_killed_reference_pass_goes_on(config: Config, tmp_path: Path) -> None:
    """Killed when five of 24 rows are there: no more than a few are computed twice."""
    cache = tmp_path / "reference-cache"
    kill_when(config, SLOW_REFERENCE, lambda: len(list(cache.rglob("rows-*"))) >= 5)
    blocks = len(list(cache.rglob("rows-*")))
    assert blocks < 2 * NUM_PAIRS
    assert not (tmp_path / "run").exists()
    assert reference_line(run(config)) == (2 * NUM_PAIRS - blocks, blocks)


def test_a_killed_training_goes_on_to_the_last_bit(config: Config, tmp_path: Path) -> None:
    """Killed after step 5, when the checkpoint of step 4 is the newest, perhaps while writing whatever comes next."""
    whole = run(changed(config, train__run_dir=str(tmp_path / "whole")))
    kill_when(config, SLOW_TRAINING, lambda: len(train_lines(tmp_path / "run")) >= 5)
    assert len(train_lines(tmp_path / "run")) < 9
    parts = run(config)
    assert without_clock(train_lines(parts)) == without_clock(train_lines(whole))
    assert same_weights(whole / "final", parts / "final")


@pytest.mark.parametrize("function", ["_make_draft", "_commit", "_inventory"])
def test_killed_while_a_checkpoint_is_written(config: Config, tmp_path: Path, function: str) -> None:
    """Training is past step 4, whose checkpoint is nothing yet, or all files but state.json and the marker, or all but
    the marker: the run goes on from step 2, and no draft stays.
    """
    whole = run(changed(config, train__run_dir=str(tmp_path / "whole")))
    checkpoints = tmp_path / "run/checkpoints"
    is_held = checkpoints / "held"

    def is_time() -> bool:
        return is_held.exists() and len(train_lines(tmp_path / "run")) >= 5

    kill_when(config, HELD_WRITING.format(name=function), is_time)
    is_held.unlink()
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {"step-000002"} | ({"step-000004.tmp"} if function != "_make_draft" else set())
    assert newest_checkpoint(tmp_path / "run") == checkpoint_path(tmp_path / "run", 2)
    parts = run(config)
    assert without_clock(train_lines(parts)) == without_clock(train_lines(whole))
    assert same_weights(whole / "final", parts / "final")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000008", "step-000009"]
