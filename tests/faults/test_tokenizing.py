"""The processes that tokenize: what becomes of them and of the run when one of them, or the run, is ended."""

import contextlib
import gc
import io
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dpo.config import Config, to_yaml
from dpo.distributed.program import run_program
from dpo.pairs import token_rows
from dpo.pairs.prepare import prepare_data
from dpo.run_folder.advice import AFTER_TRAINING
from dpo.train import program as train
from tests.support.caches import cache_of_datasets
from tests.support.garbage import collect_and_tokenize, leave_group
from tests.support.models import family_config, save_model, save_pairs
from tests.support.processes import start_program
from tests.support.ranks import Ranks
from tests.support.runs import changed, error_lines, make_config

NUM_PROC = 3


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run whose data no cache has, since its rows are drawn from a seed of this test's own."""
    seed = int.from_bytes(os.urandom(4))
    model, pairs = save_model(tmp_path / "model", "llama"), save_pairs(tmp_path / "pairs.jsonl", 8, seed)
    return make_config(model, pairs, tmp_path / "run", batch__pairs_per_step=4, train__steps=1, data__num_proc=NUM_PROC)


def test_garbage_of_the_parent_is_not_collected(config: Config, tmp_path: Path) -> None:
    """Workers that collect a gloo group hang: this test would then run into its timeout."""
    gc.disable()
    try:
        group = leave_group()
        with patch.object(token_rows, "tokenize_row", collect_and_tokenize):
            for max_length in (64, 65, 66):  # each is another set of token rows
                prepared = prepare_data(changed(config, data__max_length=max_length), family_config("llama"))
                assert len(prepared.train.token_files) == NUM_PROC
        assert group() is not None, "the group was there at each fork"
        gc.collect()
        assert group() is None
    finally:
        gc.enable()


# --- a run in a process group of its own -----------------------------------------------------------------------------

MAIN = """
import os, signal, threading
from dpo.train import program as train
from dpo.pairs import token_rows
from dpo.distributed.program import exit_program
from dpo.run_folder.advice import AFTER_TRAINING

def hold(*args, **options):
    pids.send_bytes(os.getpid().to_bytes(4, "big"))
    threading.Event().wait()

token_rows.tokenize_row = hold
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where a shell started all in the background
exit_program(train.main, AFTER_TRAINING)
"""
"""Each worker tells its number at its first row, and waits for ever."""


class Held:
    """A run whose workers wait at their first rows."""

    def __init__(self, config: Config, folder: Path):
        (folder / "config.yaml").write_text(to_yaml(config))
        words = ["--config", str(folder / "config.yaml"), "--quiet"]
        self.stderr = folder / "stderr"
        self.pids, theirs = multiprocessing.Pipe(duplex=False)
        self.process = start_program(MAIN, words, self.stderr, pids=theirs)
        theirs.close()
        assert self.process.pid is not None
        self.pid = self.process.pid
        try:
            self.workers = [int.from_bytes(self.pids.recv_bytes(), "big") for _ in range(NUM_PROC)]
        except EOFError:
            raise AssertionError(self.stderr.read_text()) from None

    def end(self) -> tuple[int, str]:
        """The exit code and stderr, once no process is left that the run started: all of them hold the pipe."""
        with pytest.raises(EOFError):
            self.pids.recv_bytes()
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode, self.stderr.read_text()


@pytest.fixture
def held(config: Config, tmp_path: Path) -> Iterator[Held]:
    run = Held(config, tmp_path)
    yield run
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.pids.close()


def test_no_worker_is_left_by_a_run_that_is_killed(held: Held) -> None:
    held.process.kill()
    assert held.end() == (-signal.SIGKILL, "")


def test_ctrl_c_is_one_line(held: Held) -> None:
    """A terminal sends it to the run and to its workers."""
    os.killpg(held.pid, signal.SIGINT)
    code, stderr = held.end()
    assert code == 130
    assert stderr == f"stopped; {AFTER_TRAINING}\n"


def test_a_worker_that_is_killed_is_one_line(held: Held) -> None:
    os.kill(held.workers[1], signal.SIGKILL)
    code, stderr = held.end()
    assert code == 1
    (line,) = stderr.splitlines()
    assert line.startswith("error: data.num_proc: one of 3 processes that tokenize on ")
    assert " was killed, as the kernel does when the host's memory runs out; what helps: data.num_proc below 3" in line


# --- one rank of two -------------------------------------------------------------------------------------------------


def killed(*args: Any, **options: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def train_as_rank(config: Config, rank: int, cache: str) -> tuple[int, list[str]]:
    """Trains as a rank of two, each with a cache of its own, as on two nodes; the workers of `rank` are killed: (exit
    code, lines on stderr).
    """
    mine = int(os.environ["RANK"])
    stderr = io.StringIO()
    fault = patch.object(token_rows, "tokenize_row", killed) if mine == rank else contextlib.nullcontext()
    own_cache = cache_of_datasets(f"{cache}-{mine}")
    with own_cache, fault, contextlib.redirect_stderr(stderr):
        code = run_program(lambda: train.run_training(config))
    return code, stderr.getvalue().splitlines()


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_end_together_when_a_worker_of_one_is_killed(config: Config, tmp_path: Path, ranks: Ranks, rank: int):
    """Rank 0 says so, whosever worker it was; no rank waits for the other."""
    (code, lines), other = ranks(2, train_as_rank, config, rank, str(tmp_path / "cache"))
    assert code == 1 and other == (1, [])
    (line,) = error_lines("\n".join(lines))
    assert line.startswith("error: data.num_proc: one of 3 processes that tokenize on ")
    assert lines[-1] == line
