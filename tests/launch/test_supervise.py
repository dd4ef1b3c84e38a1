"""A torchrun and its ranks as the launcher sees them: signals, time limits, and nothing that is left running.

Plain Python processes stand in for them: a parent that, like torchrun, knows no SIGUSR2, and children that do.
"""

import errno
import io
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import stops, supervise
from launch.stops import ENDING, Signals, signals
from launch.supervise import Ended, Ending, Watch, children, descendants, run

PARENT = """
import subprocess, sys
children = [subprocess.Popen([sys.executable, "-c", sys.argv[1], str(i)], start_new_session=True) for i in range(2)]
sys.exit(max(child.wait() for child in children))
"""
SAVES = """
import pathlib, signal, sys, time
place, rank = pathlib.Path(PLACE), sys.argv[1]
assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN, "would die of a signal that comes before its handler"
while not (place / "imported").exists(): time.sleep(0.02)
stop = []
signal.signal(signal.SIGUSR2, lambda *_: stop.append(1))
(place / f"ready-{rank}").touch()
while not stop: time.sleep(0.05)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
(place / f"saved-{rank}").touch()
"""
DEAF = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(PLACE, f"ready-{sys.argv[1]}").touch()
time.sleep(600)
"""
SAVING = Ending("saving after the current step; a second signal ends the run at once")


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """SIGUSR2 as it was."""
    before = signal.getsignal(signal.SIGUSR2)
    yield
    signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs a parent with two children that run `code`; a signal comes once both are ready, or while they import."""
    monkeypatch.setattr(supervise, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(supervise, "_REPEAT_SECONDS", 0.1)

    def start(
        code: str,
        number: int | None = None,
        early: bool = False,
        grace: float = 60,
        goes_on: bool | None = None,
        asks: Callable[[], None] = lambda: None,
        peer_failed: Callable[[], bool] = bool,
        ending: Ending = SAVING,
        end_seconds: float = 60,
    ) -> Ended:
        over = threading.Event()

        def send(number: int) -> None:
            while not early and len(list(tmp_path.glob("ready-*"))) < 2:
                time.sleep(0.02)
            if not over.wait(0.3):
                os.kill(os.getpid(), number)
            imported.touch()

        imported = tmp_path / "imported"
        if not early:
            imported.touch()
        if number is not None:
            threading.Thread(target=send, args=(number,), daemon=True).start()
        words = [sys.executable, "-c", PARENT, code.replace("PLACE", repr(str(tmp_path)))]

        def answer() -> bool | None:
            asks()
            return goes_on

        with signals(answer, lambda: end_seconds) as noted:
            watch = Watch(peer_failed, lambda: ending)
            ended = run(words, os.environ, noted, grace, watch, tmp_path / "later.txt")
            over.set()
        return ended

    return start


def survivors(tmp_path: Path) -> Sequence[str]:
    """Command lines of processes that still know the test's folder."""
    found = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if str(tmp_path) in line]


@pytest.mark.parametrize("early", [True, False], ids=["while they import", "while they work"])
def test_the_ranks_save_when_the_launcher_is_told(
    supervised: Callable[..., Ended], early: bool, tmp_path: Path
) -> None:
    """Also those that cannot hear it yet: it is said again until they end."""
    assert supervised(SAVES, signal.SIGUSR2, early=early).exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert not survivors(tmp_path)


def test_ranks_that_do_not_save_are_ended(
    supervised: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Deaf to SIGTERM too, and orphaned by a parent that dies of it: SIGKILL."""
    monkeypatch.setattr(supervise, "_TERM_SECONDS", 1.0)
    started = time.monotonic()
    assert supervised(DEAF, signal.SIGUSR2, grace=1.0).exit_code == -signal.SIGTERM
    assert 1 < time.monotonic() - started < 20
    assert not survivors(tmp_path)


ENDINGS = [(signal.SIGTERM, True), (signal.SIGTERM, None), *((number, False) for number in ENDING)]
ENDINGS_IDS = ["SLURM preempts it", "nobody answers", "scancel", "Ctrl-C", "a closed terminal"]


@pytest.mark.parametrize(("number", "goes_on"), ENDINGS, ids=ENDINGS_IDS)
def test_the_ranks_save_when_the_job_is_ended(
    supervised: Callable[..., Ended], number: int, goes_on: bool | None, tmp_path: Path
) -> None:
    """Whether or not it starts again."""
    assert supervised(SAVES, number, goes_on=goes_on).exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


def test_the_ranks_are_told_before_slurm_is_asked(supervised: Callable[..., Ended], tmp_path: Path) -> None:
    """The answer may take most of the time that SLURM leaves; this one comes once the ranks have saved."""
    deadline = time.monotonic() + 30

    def asks() -> None:
        while len(list(tmp_path.glob("saved-*"))) < 2:
            assert time.monotonic() < deadline, "the ranks were not told"
            time.sleep(0.02)

    assert supervised(SAVES, signal.SIGTERM, goes_on=False, asks=asks).exit_code == 0


@pytest.mark.parametrize("number", ENDING)
def test_before_the_first_step_all_end_at_once(
    supervised: Callable[..., Ended], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks have nothing to save; these would end only in ten minutes."""
    monkeypatch.setattr(supervise, "_TERM_SECONDS", 1.0)
    assert supervised(DEAF, number, goes_on=False, ending=Ending("ending", 0.0)).exit_code == -signal.SIGTERM
    assert not survivors(tmp_path)


@pytest.mark.parametrize("number", ENDING)
def test_ranks_with_little_to_save_are_told_too(supervised: Callable[..., Ended], number: int, tmp_path: Path) -> None:
    """The reference pass keeps the rows of its last seconds."""
    assert supervised(SAVES, number, goes_on=False, ending=Ending("keeping", 60.0)).exit_code == 0
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_ranks_with_little_to_save_are_ended_soon(
    supervised: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are still loading the model hear nothing."""
    monkeypatch.setattr(supervise, "_TERM_SECONDS", 1.0)
    ended = supervised(DEAF, signal.SIGTERM, goes_on=False, ending=Ending("keeping", 0.5), end_seconds=600)
    assert ended.exit_code == -signal.SIGTERM
    assert not survivors(tmp_path)


def test_ranks_that_do_not_save_before_slurm_kills_them_are_ended(
    supervised: Callable[..., Ended], tmp_path: Path
) -> None:
    assert supervised(DEAF, signal.SIGTERM, goes_on=False, grace=600, end_seconds=1.0).exit_code == -signal.SIGTERM
    assert not survivors(tmp_path)


@pytest.mark.parametrize("number", ENDING)
def test_a_second_signal_ends_all_at_once(
    supervised: Callable[..., Ended], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that never save, without a limit."""
    monkeypatch.setattr(supervise, "_TERM_SECONDS", 1.0)
    again = threading.Timer(0, lambda: None)

    def tell(line: str) -> None:
        nonlocal again
        assert (
            line
            == f"{signal.Signals(number).name}: saving after the current step; a second signal ends the run at once"
        )
        again = threading.Timer(1.5, os.kill, (os.getpid(), number))
        again.start()

    monkeypatch.setattr(supervise, "say", tell)
    assert supervised(DEAF, number, goes_on=False, grace=600, end_seconds=600).exit_code == -signal.SIGTERM
    again.join()
    assert not survivors(tmp_path)


LAUNCHER = """
import os, pathlib, sys
from launch.stops import signals
from launch.supervise import Watch, run
with signals(None) as noted:
    run(sys.argv[1:], os.environ, noted, 600, Watch(bool, lambda: None), pathlib.Path("/dev/null"))
"""
FALLS = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "0"], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: (child.kill(), sys.exit(1)))
child.wait()
"""
"""A parent that, like torchrun, ends its child when it gets SIGTERM."""


def test_nothing_is_left_of_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """kill -9, as by the kernel where memory runs out."""
    code = DEAF.replace("PLACE", repr(str(tmp_path)))
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, sys.executable, "-c", FALLS, code])
    while not (tmp_path / "ready-0").exists():
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.kill()
    launcher.wait()
    while survivors(tmp_path):  # the test's own time limit ends it where they stay
        time.sleep(0.02)


def test_a_node_that_does_not_notice_another_ones_failure_is_ended(
    supervised: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervise, "_PEER_SECONDS", 0.5)
    ready = lambda: len(list(tmp_path.glob("ready-*"))) == 2  # noqa: E731
    assert supervised(DEAF, peer_failed=ready).exit_code == -signal.SIGTERM
    assert not survivors(tmp_path)


def test_what_it_says_is_shown_and_kept(supervised: Callable[..., Ended], capsys: pytest.CaptureFixture[str]) -> None:
    """Also bytes that are no text, which must not stop the copying."""
    ended = supervised("import sys; sys.stderr.buffer.write(b'a\\xffb\\n' * 3); sys.exit(3)")
    assert ended.exit_code == 3
    assert ended.stderr == "a\ufffdb\n" * 6 == capsys.readouterr().err


class Terminal(io.StringIO):
    """Takes a progress bar."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_left_to_the_ranks(
    supervised: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bar is drawn where stderr is one; through a pipe it would not be."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    ended = supervised("import sys; print('a bar', file=sys.stderr)")
    assert ended == Ended(0, "") and capfd.readouterr().err == "a bar\n" * 2


class FullDisk(io.StringIO):
    """A log that takes nothing."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_does_not_stop_the_ranks(supervised: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe holds 64 KiB: ranks that say more would wait for a reader that gave up on its log."""
    monkeypatch.setattr(sys, "stderr", FullDisk())
    ended = supervised("import sys; sys.stderr.write('a line\\n' * 30000)")
    assert ended.exit_code == 0 and ended.stderr.endswith("a line\n")


BOUNDED = """
import functools, os, pathlib, sys
from launch import supervise
from launch.stops import signals
supervise.Output = functools.partial(supervise.Output, max_bytes=100)
with signals(None) as noted:
    later = pathlib.Path(sys.argv.pop(1))
    print(supervise.run(sys.argv[1:], os.environ, noted, 600, supervise.Watch(bool, lambda: None), later).exit_code)
"""


@pytest.mark.parametrize("is_one_log", [True, False])
def test_what_the_ranks_print_counts_in_the_log_of_a_job(tmp_path: Path, is_one_log: bool) -> None:
    """100 lines of 10 bytes on stdout, as of NCCL_DEBUG=INFO; a user may have led stdout to a file of its own."""
    log, other, later = (tmp_path / name for name in ("log", "other", "later.txt"))
    words = [sys.executable, "-c", BOUNDED, later, sys.executable, "-c", "for i in range(100): print(f'line {i:4}')"]
    with log.open("wb") as stderr, other.open("wb") as stdout:
        subprocess.run(words, stdout=stderr if is_one_log else stdout, stderr=stderr, check=True)
    numbers = [sum(line.startswith("line ") for line in _lines(path)) for path in (log, other, later)]
    assert numbers == ([10, 0, 10] if is_one_log else [0, 100, 0])


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_late_sigusr2_is_ignored() -> None:
    """submitit's handler would start a job again that is done."""
    before = signal.getsignal(signal.SIGTERM)
    with signals(lambda: None) as noted:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert noted.stop_since is not None and not noted.ended
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is before


def test_a_sigterm_whose_meaning_is_asked_for_again() -> None:
    """First nobody answers, then it is preempted; a second SIGTERM is the end."""
    answers: list[bool | None] = [None, True, False]
    with signals(lambda: answers.pop(0)) as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.stop_since is not None
        for left in (2, 1, 1):
            noted.look()
            assert len(answers) == left and not noted.ended
        os.kill(os.getpid(), signal.SIGTERM)
        noted.look()
        assert noted.ended


@pytest.mark.parametrize("unanswered", [0, 2])
def test_the_time_to_save_begins_at_the_signal(monkeypatch: pytest.MonkeyPatch, unanswered: int) -> None:
    """By a clock of the test: each question takes squeue 6 seconds, and of the last one the answer is `cancelled`. How
    long an end takes is asked once, when it is known to be one.
    """
    now = [1000.0]
    answers: list[bool | None] = [*[None] * unanswered, False]
    asked: list[float] = []

    def slowly() -> bool | None:
        now[0] += 6
        return answers.pop(0)

    def end_seconds() -> float:
        asked.append(now[0])
        return 22.5

    monkeypatch.setattr(stops, "time", SimpleNamespace(monotonic=lambda: now[0]))
    noted = Signals(slowly, end_seconds)
    noted.look()
    noted.on_end(signal.SIGTERM, None)
    for _ in range(unanswered + 2):
        noted.look()
    assert noted.deadline(90) == 1022.5
    assert asked == [1000.0 + 6 * (unanswered + 1)]


def test_the_time_to_save_begins_at_the_signal_that_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test: a preemption with a time of grace, and SLURM's SIGTERM at its end."""
    now, answers = [1000.0], [True, False]
    monkeypatch.setattr(stops, "time", SimpleNamespace(monotonic=lambda: now[0]))
    noted = Signals(lambda: answers.pop(0), end_seconds=lambda: 22.5)
    for now[0], deadline in ((1000.0, 1090), (1060.0, 1082.5)):
        noted.on_end(signal.SIGTERM, None)
        noted.look()
        assert noted.deadline(90) == deadline


def test_ctrl_c_stays_ignored_where_a_shell_ignores_it() -> None:
    """A job that `dpo submit ... &` starts is not ended by the Ctrl-C that ends another."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals(None) as noted:
            os.kill(os.getpid(), signal.SIGINT)
            assert not noted.ended
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_that_come_together_are_one_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test: timeout(1) sends SIGTERM twice."""
    now = [1000.0]
    monkeypatch.setattr(stops, "time", SimpleNamespace(monotonic=lambda: now[0]))
    noted = Signals(None, end_seconds=lambda: 20.0)
    assert noted.deadline(90) == math.inf
    noted.on_stop(signal.SIGUSR2, None)
    assert noted.deadline(90) == 1090
    for now[0], deadline in ((1010.0, 1030), (1010.9, 1030), (1011.1, 0)):
        noted.on_end(signal.SIGTERM, None)
        noted.look()
        assert noted.deadline(90) == deadline


def test_the_tree_of_processes() -> None:
    """A shell with a shell with two sleeps."""
    shell = subprocess.Popen(["sh", "-c", "sh -c 'sleep 60 & sleep 60 & wait'; true"])
    try:
        while len(descendants(shell.pid)) < 3:
            time.sleep(0.02)
        (inner,) = children(shell.pid)
        assert len(children(inner)) == 2
        assert sorted(descendants(shell.pid)) == sorted([inner, *children(inner)])
    finally:
        supervise.send(signal.SIGKILL, [*descendants(shell.pid), shell.pid])
        shell.wait()


def test_torchrun_may_open_as_many_files_as_the_hard_limit(tmp_path: Path) -> None:
    """It serves the store, with a connection to every rank; the launcher itself keeps its limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    file = str(tmp_path / "limit")
    code = f"import resource; open({file!r}, 'w').write(str(resource.getrlimit(resource.RLIMIT_NOFILE)))"
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        with signals(lambda: None) as noted:
            words, watch = [sys.executable, "-c", code], Watch(bool, lambda: SAVING)
            run(words, os.environ, noted, 60, watch, tmp_path / "later.txt")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(soft, hard - 1), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "limit").read_text() == str((hard, hard))
