"""Real processes of which one stops: all are gone soon after the timeout, and the last line says where and why.

`python -m tests.bench.stopped_ranks` measures the seconds. Here no bound is so tight that a busy machine breaks it, but
torchrun's thirty seconds of grace are seen not to be what ended the ranks: the watcher did, who says so.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.config import Config, to_yaml
from dpo.distributed.program import exit_program
from dpo.train.program import run_training
from dpo.watch.folders import MEMORY
from tests.front.test_stops import is_alive
from tests.front.test_train import MAIN as DPO
from tests.support import faulty_rank
from tests.support.faulty_rank import break_function
from tests.support.processes import start, start_program
from tests.support.ranks import _environment, _free_port
from tests.support.runs import save_six_steps, six_steps

TIMEOUT, PATIENCE = 5, 120.0
"""parallel.timeout_seconds; seconds after which a test gives up."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl, eval.jsonl."""
    return save_six_steps(tmp_path_factory.mktemp("stops"))


def config_in(root: Path, folder: Path) -> Config:
    return six_steps(root, folder / "run", parallel__timeout_seconds=TIMEOUT, train__eval_every=None)


def be_rank(rank: int, port: int, folder: Path, config: Config, fault: str, function: tuple[str, str, int]) -> None:
    """A rank of two, of which rank 1 has a fault; their error files are those of torchrun's folders."""
    import importlib

    import torch

    torch.set_num_threads(1)
    os.environ.update(_environment(rank, 2, port) | {"TORCHELASTIC_ERROR_FILE": str(folder / str(rank) / "error.json")})
    (folder / str(rank)).mkdir()
    os.dup2(os.open(folder / str(rank) / "stderr", os.O_WRONLY | os.O_CREAT, 0o644), 2)
    if rank == 1:
        module, name, number = function
        break_function(importlib.import_module(module), name, number, faulty_rank.FAULTS[fault])
    exit_program(lambda: run_training(config))


CASES = {
    "stop": ("forward", "no sign of life for N s: stopped (SIGSTOP), in the forward pass of step 4, micro-batch 1"),
    "hold_the_lock": (
        "save",
        "no sign of life for N s: its process sleeps and holds Python's lock, in the checkpoint of",
    ),
    "hang": ("forward", "in the forward pass of step 4, micro-batch 1 for "),
}


@pytest.mark.parametrize("fault", CASES)
def test_both_ranks_end_and_the_one_that_stopped_is_named(fault: str, root: Path, tmp_path: Path) -> None:
    """Without a launcher: what ends rank 1 is the watcher. Its error file is written for it, and names it."""
    place, words = CASES[fault]
    port, config = _free_port(), config_in(root, tmp_path)
    ranks = [start(be_rank, rank, port, tmp_path, config, fault, faulty_rank.PLACES[place]) for rank in range(2)]
    try:
        for rank in ranks:
            rank.join(PATIENCE)
        assert [rank.exitcode for rank in ranks] == [1, -signal.SIGKILL]
    finally:
        for rank in ranks:
            rank.kill()
    extra = json.loads((tmp_path / "1/error.json").read_text())["message"]["extraInfo"]
    assert (
        extra["is_silent"]
        and words in without_seconds(extra["user_line"])
        and extra["py_callstack"].startswith("rank 1 on ")
    )
    (error,) = [line for line in (tmp_path / "0/stderr").read_text().splitlines() if line.startswith("error:")]
    assert error.startswith("error: rank 0: lost rank 1 on ") and words.split(" s:")[0] in without_seconds(error)
    lost = json.loads((tmp_path / "0/error.json").read_text())["message"]["extraInfo"]
    assert lost["is_consequence"] and lost["seconds"] > extra["seconds"]


def without_seconds(line: str) -> str:
    """A line without how long a rank was silent: from the limit on, and a second later for the watcher."""
    return re.sub(r"no sign of life for \d+ s", "no sign of life for N s", line)


def wait_for(is_there: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not is_there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_the_last_line_of_dpo_train_names_the_rank_and_nothing_is_left(root: Path, tmp_path: Path) -> None:
    """A stopped rank under `dpo train`, which others than this test stop: no process and no file outlives it."""
    before = set(MEMORY.glob("dpo-slots-*"))
    (tmp_path / "c.yaml").write_text(to_yaml(config_in(root, tmp_path)))
    variables = faulty_rank.environment("stop", "forward")
    code = f"import os\nos.environ.update({variables!r})\n{DPO}"
    process = start_program(code, ["train", str(tmp_path / "c.yaml"), "--ranks", "2"], tmp_path / "stderr")
    process.join(PATIENCE)
    assert process.exitcode == 1
    last = without_seconds((tmp_path / "stderr").read_text().splitlines()[-1])
    assert last.startswith("error: rank 1 on ")
    assert last.endswith(": no sign of life for N s: stopped (SIGSTOP), in the forward pass of step 4, micro-batch 1")
    wait_for(lambda: not (set(MEMORY.glob("dpo-slots-*")) - before))
    assert not [path for path in Path("/proc").glob("[0-9]*") if is_alive(int(path.name)) and _is_of(path, tmp_path)]


def _is_of(process: Path, folder: Path) -> bool:
    try:
        return str(folder).encode() in (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
