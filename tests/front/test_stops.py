"""Signals to `dpo NAME --ranks 2`, whose ranks are a stub: exit codes, the last line, and no rank that outlives it.

The ranks are processes of their own, as `dpo` starts them; `test_train.py` has the trainer in them.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.front.stub import SAVED
from tests.support.processes import start_program

END_WITH_TESTS = """
import os
from dpo.base.workers import end_with
end_with(os.getppid())
"""
"""A program that runs until it gets a signal also ends where the tests are killed."""
MAIN = (
    END_WITH_TESTS
    + """
from unittest.mock import patch
from dpo.front.main import main
from dpo.front.names import COMMANDS, FLAGS, Command
row = Command("tests.front.stub", "a stub", after_stop="AFTER", before_steps="BEFORE; ")
with patch.dict(COMMANDS, {"stub": row}), patch.dict(FLAGS, {"stub": ""}):
    main()
"""
)
SECONDS = 120
"""After which a test gives up: no test waits so long unless something is broken."""


def wait_for(is_there: Callable[[], object]) -> None:
    """Waits until something is so."""
    end = time.monotonic() + SECONDS
    while not is_there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Started:
    """`dpo stub MODE` on two ranks, which are where the mode says."""

    def __init__(self, mode: str, folder: Path) -> None:
        self.folder = folder
        self.stderr = folder / "stderr"
        words = ["stub", mode, str(folder), "--ranks", "2"]
        self.process: BaseProcess = start_program(MAIN, words, self.stderr)
        wait_for(lambda: all((folder / f"rank-{rank}").exists() for rank in range(2)) or not self.process.is_alive())
        self.ranks: list[dict[str, Any]] = [json.loads((folder / f"rank-{rank}").read_text()) for rank in range(2)]

    @property
    def pid(self) -> int:
        """Returns the id of the parent's process, which is that of its group."""
        assert self.process.pid is not None
        return self.process.pid

    def end(self) -> tuple[int | None, str]:
        """Returns the exit code and the last line, once all have ended."""
        self.process.join(SECONDS)
        wait_for(lambda: not any(is_alive(rank["pid"]) for rank in self.ranks))
        return self.process.exitcode, (self.stderr.read_text().splitlines() or [""])[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Started]]:
    """Starts a mode of the stub; nothing of it outlives the test."""
    started: list[Started] = []

    def start_mode(mode: str) -> Started:
        started.append(Started(mode, tmp_path))
        return started[-1]

    yield start_mode
    for program in started:
        program.process.kill()
        program.process.join()


def test_a_program_that_is_done(start: Callable[[str], Started]) -> None:
    """And the environment of its ranks, which is torchrun's: https://docs.pytorch.org/docs/stable/elastic/run.html."""
    program = start("fine")
    assert program.end() == (0, "")
    for number, rank in enumerate(program.ranks):
        assert rank["RANK"] == rank["LOCAL_RANK"] == rank["ROLE_RANK"] == str(number)
        assert rank["WORLD_SIZE"] == rank["LOCAL_WORLD_SIZE"] == rank["ROLE_WORLD_SIZE"] == "2"
        assert rank["GROUP_RANK"] == rank["TORCHELASTIC_RESTART_COUNT"] == rank["TORCHELASTIC_MAX_RESTARTS"] == "0"
        assert rank["MASTER_ADDR"] and int(rank["MASTER_PORT"]) > 0 and rank["TORCHELASTIC_RUN_ID"]
        assert rank["TORCHELASTIC_ERROR_FILE"].endswith(f"/{number}/error.json")
        assert int(rank["OMP_NUM_THREADS"]) >= 1 and rank["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGUSR2, 0)]
)
def test_a_signal_saves(start: Callable[[str], Started], number: int, code: int) -> None:
    program = start("training")
    os.kill(program.pid, number)
    assert program.end() == (code, f"stopped; step {SAVED} is saved: the same command goes on from there")


def test_a_terminal_signals_the_whole_group(start: Callable[[str], Started]) -> None:
    """Which holds the parent and no rank: each rank has a session of its own."""
    program = start("training")
    assert {os.getsid(rank["pid"]) for rank in program.ranks} == {rank["pid"] for rank in program.ranks}
    os.killpg(program.pid, signal.SIGINT)
    assert program.end() == (130, f"stopped; step {SAVED} is saved: the same command goes on from there")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_the_first_step_nothing_is_saved(start: Callable[[str], Started], number: int, code: int) -> None:
    program = start("preparing")
    os.kill(program.pid, number)
    assert program.end() == (code, "stopped; BEFORE; AFTER")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_in_the_evaluation_before_the_first_step(start: Callable[[str], Started], number: int, code: int) -> None:
    program = start("evaluating")
    os.kill(program.pid, number)
    assert program.end() == (code, "stopped; BEFORE; AFTER")


def test_a_second_signal_kills(start: Callable[[str], Started]) -> None:
    program = start("stuck")
    os.kill(program.pid, signal.SIGINT)
    wait_for(lambda: "saving after the current step" in program.stderr.read_text())
    assert all(is_alive(rank["pid"]) for rank in program.ranks)
    os.kill(program.pid, signal.SIGINT)
    assert program.end() == (130, "stopped; the ranks were ended before they had saved: AFTER")


def test_a_run_that_ends_by_itself_after_a_signal_is_done(start: Callable[[str], Started]) -> None:
    program = start("ending")
    os.kill(program.pid, signal.SIGINT)
    code, line = program.end()
    assert code == 0 and not line.startswith("stopped")


def test_a_signal_waits_for_a_rank_that_does_not_listen_yet(start: Callable[[str], Started]) -> None:
    """It neither kills the rank nor is lost. The kernel holds it: ShdPnd of /proc, a bit per signal."""
    program = start("importing")
    os.kill(program.pid, signal.SIGTERM)
    status = Path(f"/proc/{program.ranks[1]['pid']}/status")

    def is_held_back() -> bool:
        (pending,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("ShdPnd:"))
        return bool(int(pending, 16) >> (signal.SIGUSR2 - 1) & 1)

    wait_for(is_held_back)
    (program.folder / "listen").touch()
    assert program.end() == (0, f"stopped; step {SAVED} is saved: the same command goes on from there")


def test_a_signal_after_one_rank_is_done(start: Callable[[str], Started]) -> None:
    """The parent has taken its exit code: no process has its id any more."""
    program = start("waiting_for_rank_0")
    wait_for(lambda: not Path(f"/proc/{program.ranks[1]['pid']}").exists())
    os.kill(program.pid, signal.SIGTERM)
    assert program.end() == (0, f"stopped; step {SAVED} is saved: the same command goes on from there")


def test_a_killed_rank_is_named_in_the_last_line(start: Callable[[str], Started]) -> None:
    code, line = start("killed").end()
    assert code == 1 and line.startswith("error: rank 1 ") and "killed by SIGKILL" in line


def test_no_rank_outlives_its_parent(start: Callable[[str], Started]) -> None:
    program = start("stuck")
    os.kill(program.pid, signal.SIGKILL)
    assert program.end()[0] == -signal.SIGKILL
