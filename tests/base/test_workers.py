"""Forked workers: what they leave alone, and that none outlives the process that waits for it."""

import functools
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.base.workers import Report, WorkerDied, run_in_workers, signal_name

ROOT = Path(__file__).parents[2]


def wait_for_ever(report: Report) -> None:
    """Ends by a signal alone."""
    report(os.getpid())
    threading.Event().wait()


def run_beside_two_that_wait(work: Callable[[], None]) -> None:
    """Runs `work` in a worker while two others wait for ever, and asserts that these are gone then."""
    begin, allow = os.pipe()
    pids: list[int] = []

    def report(pid: int) -> None:
        pids.append(pid)
        if len(pids) == 2:
            os.write(allow, b"!")

    def begins_last(report: Report) -> None:
        os.read(begin, 1)
        work()

    try:
        run_in_workers([wait_for_ever, begins_last, wait_for_ever], report)
    finally:
        os.close(begin)
        os.close(allow)
        assert len(pids) == 2
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_each_work_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    def work(number: int, report: Report) -> None:
        (tmp_path / f"{number}").write_text(str(os.getpid()))
        for _ in range(number):
            report(10)

    counts: list[int] = []
    run_in_workers([functools.partial(work, number) for number in (1, 2, 3)], counts.append)
    assert counts == [10] * 6
    pids = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert len(pids) == 3 and os.getpid() not in pids


def test_what_a_worker_raises_is_raised() -> None:
    """With the place where it was raised."""

    def fail() -> None:
        raise OSError(28, "No space left on device", "tokens.arrow")

    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: 'tokens.arrow'") as raised:
        run_beside_two_that_wait(fail)
    assert "in fail\n    raise OSError(28" in raised.value.__notes__[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed(number: int) -> None:
    with pytest.raises(WorkerDied) as raised:
        run_beside_two_that_wait(lambda: os.kill(os.getpid(), number))
    assert raised.value.exit_code == -number


def test_a_worker_that_exits_by_itself() -> None:
    with pytest.raises(WorkerDied) as raised:
        run_beside_two_that_wait(lambda: os._exit(7))
    assert raised.value.exit_code == 7


# --- garbage --------------------------------------------------------------------------------------------------------


class TakesTwo(Exception):
    """Pickled by its text alone, with which it cannot be made again."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} {second}")


class HoldsAFunction(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("so it is", lambda: None)


@pytest.mark.parametrize(
    ("failure", "text"), [(TakesTwo("so", "it is"), "TakesTwo: so it is"), (HoldsAFunction(), "HoldsAFunction")]
)
def test_a_failure_that_cannot_be_pickled_keeps_its_text(failure: Exception, text: str) -> None:
    def work(report: Report) -> None:
        raise failure

    with pytest.raises(RuntimeError, match=rf"^{text}") as raised:
        run_in_workers([work], lambda _: None)
    assert any("in work\n    raise failure" in note for note in raised.value.__notes__)


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (15, "SIGTERM"), (signal.SIGRTMIN + 1, "signal 35")])
def test_names_of_signals(number: int, name: str) -> None:
    assert signal_name(number) == name


class Garbage:
    """Refers to itself, so that the collector alone ends it; says in which process it did."""

    def __init__(self, folder: Path):
        self.folder, self.itself = folder, self

    def __del__(self) -> None:
        (self.folder / str(os.getpid())).touch()


@pytest.mark.parametrize("collects", [True, False])
def test_workers_collect_their_own_garbage_and_none_that_they_inherit(tmp_path: Path, collects: bool) -> None:
    """Whether the collector is on in this process or not: it is afterwards as it was before."""
    (tmp_path / "inherited").mkdir()
    (tmp_path / "own").mkdir()

    def work(report: Report) -> None:
        assert gc.isenabled()
        Garbage(tmp_path / "own")
        gc.collect()

    gc.collect()
    thresholds = gc.get_threshold()
    gc.disable()
    try:
        Garbage(tmp_path / "inherited")
        frozen = gc.get_freeze_count()
        if collects:
            gc.set_threshold(10**9)  # not by itself, in this process
            gc.enable()
        run_in_workers([work, work], lambda _: None)
        assert gc.isenabled() == collects
        assert_as_frozen(frozen)
        assert not list((tmp_path / "inherited").iterdir())
        assert len(list((tmp_path / "own").iterdir())) == 2
        gc.collect()
        assert [path.name for path in (tmp_path / "inherited").iterdir()] == [str(os.getpid())]
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()


def assert_as_frozen(before: int) -> None:
    """Nothing more is frozen, and nothing was unfrozen, which would be all. A few may have lost their last reference,
    in other threads of this process too.
    """
    assert before // 2 < gc.get_freeze_count() <= before


def test_what_others_froze_stays_frozen() -> None:
    """Nothing is unfrozen afterwards: all that this session froze (`spare_the_collector`) would be collected again."""
    gc.collect()
    gc.freeze()
    frozen = gc.get_freeze_count()
    run_in_workers([lambda report: None], lambda _: None)
    assert_as_frozen(frozen)


# --- the end of the process that waits --------------------------------------------------------------------------------

PARENT = """
import signal, sys, threading
from dpo.base.workers import run_in_workers

def work(report):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP])
    report(1)
    threading.Event().wait()

def follow():
    counts = []
    def report(count):
        counts.append(count)
        if len(counts) == 3:
            print("all work", flush=True)
    run_in_workers([work] * 3, report)

signal.signal(signal.SIGINT, signal.default_int_handler)
"""
"""Three workers that hold the standard output and end by SIGKILL alone."""


def start(how: str) -> subprocess.Popen[str]:
    """A process that runs PARENT and `how`, in a process group of its own, once its three workers are at work."""
    command = [sys.executable, "-c", PARENT + how]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if line != "all work\n":
        process.kill()
        pytest.fail(f"{line}{process.communicate()}")
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("how", ["follow()", "thread = threading.Thread(target=follow); thread.start(); thread.join()"])
def test_workers_end_with_the_process_that_waits(how: str, number: int) -> None:
    """Its output ends when the last process that holds it does: `communicate` would not return before."""
    process = start(how)
    process.send_signal(number)
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == -number


def test_ctrl_c_is_raised_once() -> None:
    """The terminal sends it to all processes of the group: the workers say nothing."""
    process = start("""
try:
    follow()
except KeyboardInterrupt:
    print("interrupted", flush=True)
""")
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=120) == ("interrupted\n", "")
    assert process.returncode == 0


def test_nothing_disturbs_a_worker_before_it_is_set_up() -> None:
    """At the fork itself there comes a Ctrl-C, and the collector is off."""
    process = start("""
import gc, os

def in_worker():
    os.kill(os.getpid(), signal.SIGINT)
    if gc.isenabled():
        print("the collector is on", flush=True)

os.register_at_fork(after_in_child=in_worker)
follow()
""")
    process.kill()
    assert process.communicate(timeout=120) == ("", "")


def test_workers_that_a_helper_thread_starts_do_their_work(tmp_path: Path) -> None:
    """The kernel ends workers with the thread that forked them: it waits for them, and other threads may end."""

    def work(report: Report) -> None:
        report(1)
        (tmp_path / "go").read_text()  # a pipe: waits until it is written to
        report(1)

    def end_a_thread(count: int) -> None:
        counts.append(count)
        if len(counts) == 1:
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()
            (tmp_path / "go").write_text("")

    os.mkfifo(tmp_path / "go")
    counts: list[int] = []
    helper = threading.Thread(target=run_in_workers, args=([work], end_a_thread))
    helper.start()
    helper.join()
    assert counts == [1, 1]
