"""Signals to `dpo NAME --ranks 2`, whose ranks are a stub: exit codes, the last line, and no rank that outlives it.

The ranks are processes of their own, as `dpo` starts them; `test_train.py` has the trainer in them.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
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
import signal
from unittest.mock import patch
from dpo.front import stops
from dpo.front.main import main
from dpo.front.names import COMMANDS, Command
stops.ONE_STOP_SECONDS = one_stop_seconds
if os.isatty(2):  # becomes the terminal of this session, since it is opened for reading too
    os.close(os.open(os.ttyname(2), os.O_RDWR))
for number in ignored:
    signal.signal(number, signal.SIG_IGN)
words = "tests.front.stub_words"
row = Command("tests.front.stub", "a stub", "AFTER", "BEFORE; ", starts_ranks=True, words=words)
with patch.dict(COMMANDS, {"stub": row}):
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
    """`dpo stub MODE` on two ranks, which are where the mode says.

    Args:
        mode: of the stub.
        folder: of the test.
        stderr: a file, a pipe or a terminal, which then is the terminal of the program's session; None: a file.
        one_stop_seconds: signals that come closer together are one stop.
        ignored: signals that the program ignores when it starts.
        where: files of the folder that are there then.
    """

    def __init__(
        self,
        mode: str,
        folder: Path,
        stderr: Path | None = None,
        one_stop_seconds: float = 0,
        ignored: Sequence[int] = (),
        where: Sequence[str] = ("rank-0", "rank-1"),
    ) -> None:
        self.folder = folder
        self.stderr = stderr or folder / "stderr"
        words = ["stub", mode, str(folder), "--ranks", "2"]
        names = {"one_stop_seconds": one_stop_seconds, "ignored": ignored}
        self.process: BaseProcess = start_program(MAIN, words, self.stderr, **names)
        wait_for(lambda: all((folder / name).exists() for name in where) or not self.process.is_alive())

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """Returns the environment of each rank, and its process id as `pid`."""
        return [json.loads((self.folder / f"rank-{rank}").read_text()) for rank in range(2)]

    @property
    def pid(self) -> int:
        """Returns the id of the parent's process, which is that of its group."""
        assert self.process.pid is not None
        return self.process.pid

    def end(self) -> int | None:
        """Returns the exit code, once all have ended."""
        self.process.join(SECONDS)
        assert not self.process.is_alive(), "waited in vain"
        wait_for(lambda: not any(is_alive(rank["pid"]) for rank in self.ranks))
        return self.process.exitcode

    @property
    def told(self) -> Any:
        """Returns the status that rank 0 has told the parent at the end."""
        return json.loads((self.folder / "ended").read_text())

    def end_and_line(self) -> tuple[int | None, str]:
        """Returns the exit code and the last line, once all have ended."""
        return self.end(), (self.stderr.read_text().splitlines() or [""])[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a mode of the stub; nothing of it outlives the test."""
    started: list[Started] = []

    def start_mode(mode: str, **options: Any) -> Started:
        started.append(Started(mode, tmp_path, **options))
        return started[-1]

    yield start_mode
    for program in started:
        program.process.kill()
        program.process.join()


PREEMPTED = {"state": "preempted", "step": SAVED, "saved": True}
SAVED_LINE = f"stopped; step {SAVED} is saved: the same command goes on from there"
NOTHING_LINE = "stopped; BEFORE; AFTER"


def test_a_program_that_is_done(start: Callable[..., Started]) -> None:
    """And the environment of its ranks, which is torchrun's: https://docs.pytorch.org/docs/stable/elastic/run.html."""
    program = start("fine")
    assert program.end_and_line() == (0, "")
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
def test_a_signal_saves(start: Callable[..., Started], number: int, code: int) -> None:
    program = start("training")
    os.kill(program.pid, number)
    assert program.end_and_line() == (code, SAVED_LINE)


def test_a_terminal_signals_the_whole_group(start: Callable[..., Started]) -> None:
    """Which holds the parent and no rank: each rank has a session of its own."""
    program = start("training")
    assert {os.getsid(rank["pid"]) for rank in program.ranks} == {rank["pid"] for rank in program.ranks}
    os.killpg(program.pid, signal.SIGINT)
    assert program.end_and_line() == (130, SAVED_LINE)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_the_first_step_nothing_is_saved(start: Callable[..., Started], number: int, code: int) -> None:
    program = start("preparing")
    os.kill(program.pid, number)
    assert program.end_and_line() == (code, NOTHING_LINE)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_in_the_evaluation_before_the_first_step(start: Callable[..., Started], number: int, code: int) -> None:
    program = start("evaluating")
    os.kill(program.pid, number)
    assert program.end_and_line() == (code, NOTHING_LINE)


def test_a_second_signal_kills(start: Callable[..., Started]) -> None:
    program = start("stuck")
    os.kill(program.pid, signal.SIGINT)
    wait_for(lambda: "saving after the current step" in program.stderr.read_text())
    assert all(is_alive(rank["pid"]) for rank in program.ranks)
    os.kill(program.pid, signal.SIGINT)
    assert program.end_and_line() == (130, "stopped; the ranks were ended before they had saved: AFTER")


def test_a_second_signal_kills_ranks_that_have_saved(start: Callable[..., Started]) -> None:
    """Which is the step that the last line names."""
    program = start("saved")
    os.kill(program.pid, signal.SIGTERM)
    wait_for((program.folder / "saved").exists)
    os.kill(program.pid, signal.SIGTERM)
    assert program.end_and_line() == (0, SAVED_LINE)


def test_signals_at_once_are_one_stop(start: Callable[..., Started]) -> None:
    """As timeout(1) sends them: the second is not to kill."""
    program = start("training", one_stop_seconds=3600)
    for _ in range(5):
        os.kill(program.pid, signal.SIGTERM)
    assert program.end_and_line() == (0, SAVED_LINE)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_run_that_ends_by_itself_after_a_signal_is_done(
    start: Callable[..., Started], number: int, code: int
) -> None:
    program = start("ending")
    os.kill(program.pid, number)
    assert program.end_and_line() == (code, "stopped; the run is complete")


def test_ranks_that_are_done_and_do_not_end(start: Callable[..., Started]) -> None:
    """A first signal leaves them time, since there is nothing to save; a second kills them."""
    program = start("done")
    os.kill(program.pid, signal.SIGINT)
    waits = "SIGINT: all is saved, the 2 ranks are ending; Ctrl-C again ends the run at once"
    wait_for(lambda: waits in program.stderr.read_text())
    os.kill(program.pid, signal.SIGTERM)
    assert program.end_and_line() == (130, "stopped; the run is complete")
    assert "saving after" not in program.stderr.read_text()


# --- signals to the ranks themselves ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_a_signal_to_all_processes_saves(start: Callable[..., Started], number: int, code: int) -> None:
    """As systemd, scancel and a container send it: to the whole cgroup."""
    program = start("training")
    for pid in (*(rank["pid"] for rank in program.ranks), program.pid):
        os.kill(pid, number)
    assert program.end_and_line() == (code, SAVED_LINE)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_processes_before_the_first_step(start: Callable[..., Started], number: int, code: int) -> None:
    """Even where it comes twice."""
    program = start("preparing")
    for pid in (*(rank["pid"] for rank in program.ranks), program.pid) * 2:
        os.kill(pid, number)
    assert program.end_and_line() == (code, NOTHING_LINE)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_the_ranks_alone_saves(start: Callable[..., Started], number: int) -> None:
    """The parent has asked for nothing, and tells all the same what was saved."""
    program = start("training")
    for rank in program.ranks:
        os.kill(rank["pid"], number)
    assert program.end_and_line() == (0, SAVED_LINE)


def test_a_signal_to_the_ranks_alone_before_the_first_step(start: Callable[..., Started]) -> None:
    program = start("evaluating")
    for rank in program.ranks:
        os.kill(rank["pid"], signal.SIGUSR2)
    assert program.end_and_line() == (128 + signal.SIGUSR2, NOTHING_LINE)


HELD = """
import os, time
from pathlib import Path
folder = Path(__file__).parent
if "RANK" in os.environ:
    (folder / f"starts-{os.environ['RANK']}").write_text(str(os.getpid()))
    while not (folder / "go").exists():
        time.sleep(0.02)
"""
"""Python imports this before all else, in a rank as elsewhere."""


def test_a_signal_to_ranks_that_start_is_not_lost(
    start: Callable[..., Started], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python has no handlers yet: SIGTERM would kill it."""
    (tmp_path / "sitecustomize.py").write_text(HELD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    program = start("training", where=("starts-0", "starts-1"))
    for rank in range(2):
        wait_for((tmp_path / f"starts-{rank}").read_text)
        os.kill(int((tmp_path / f"starts-{rank}").read_text()), signal.SIGTERM)
    (tmp_path / "go").touch()
    assert program.end_and_line() == (0, SAVED_LINE)


# --- terminals -------------------------------------------------------------------------------------------------------


def test_ctrl_c_also_ends_the_reader_of_stderr(start: Callable[..., Started], tmp_path: Path) -> None:
    """`dpo train 2>&1 | tee log`: no line can be printed any more, and the step is saved all the same."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    program = start("training", stderr=tmp_path / "pipe")
    os.close(reader)
    os.killpg(program.pid, signal.SIGINT)
    assert (program.end(), program.told) == (130, PREEMPTED)


def test_a_closed_terminal_saves(start: Callable[..., Started]) -> None:
    """The kernel sends SIGHUP to the parent, whose terminal it is; nobody can write to the terminal any more."""
    terminal, there = os.openpty()
    program = start("training", stderr=Path(os.ttyname(there)))
    os.close(there)
    os.close(terminal)
    assert (program.end(), program.told) == (0, PREEMPTED)


def test_nohup_is_obeyed(start: Callable[..., Started]) -> None:
    """SIGHUP to all processes does nothing, and a signal after it is the first."""
    program = start("training", ignored=(signal.SIGHUP,))
    for pid in (*(rank["pid"] for rank in program.ranks), program.pid):
        os.kill(pid, signal.SIGHUP)
    before = len(program.stderr.read_text())
    wait_for(lambda: program.stderr.read_text()[before:].count("step") > 10 or not program.process.is_alive())
    assert all(is_alive(rank["pid"]) for rank in program.ranks)
    os.kill(program.pid, signal.SIGTERM)
    assert program.end_and_line() == (0, SAVED_LINE)
    assert "SIGTERM: saving" in program.stderr.read_text()


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_a_signal_waits_for_a_rank_that_does_not_listen_yet(start: Callable[..., Started]) -> None:
    """It neither kills the rank nor is lost. The kernel holds it: ShdPnd of /proc, a bit per signal."""
    program = start("importing")
    os.kill(program.pid, signal.SIGTERM)
    status = Path(f"/proc/{program.ranks[1]['pid']}/status")

    def is_held_back() -> bool:
        (pending,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("ShdPnd:"))
        return bool(int(pending, 16) >> (signal.SIGUSR2 - 1) & 1)

    wait_for(is_held_back)
    (program.folder / "listen").touch()
    assert program.end_and_line() == (0, SAVED_LINE)


def test_a_signal_after_one_rank_is_done(start: Callable[..., Started]) -> None:
    program = start("waiting_for_rank_0")
    wait_for(lambda: not is_alive(program.ranks[1]["pid"]))
    os.kill(program.pid, signal.SIGTERM)
    assert program.end_and_line() == (0, SAVED_LINE)


def test_a_killed_rank_is_named_in_the_last_line(start: Callable[..., Started]) -> None:
    code, line = start("killed").end_and_line()
    assert code == 1 and line.startswith("error: rank 1 ") and "killed by SIGKILL" in line


def test_no_rank_outlives_its_parent(start: Callable[..., Started]) -> None:
    program = start("stuck")
    os.kill(program.pid, signal.SIGKILL)
    assert program.end() == -signal.SIGKILL
