"""The lock of a run folder: taken, held, taken over, lost; by threads and by processes that race for it."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo.base.errors import FolderLost, UserError
from dpo.board.writer import MetricsWriter
from dpo.run_folder import lock as locks
from dpo.run_folder.holder import Holder, this_process
from dpo.run_folder.lock import Lock, holding, refuse_if_held, take
from tests.support.processes import start


@pytest.fixture
def here() -> Holder:
    return this_process({})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "my"


def of_another_host(run_dir: Path, seconds: float, **facts: Any) -> Path:
    """A lock of another host that was touched so many seconds ago by the file system's clock."""
    holder = replace(
        this_process({}), host="node7", boot="another", pid=4321, job="55", since="2026-01-01 12:00:00 UTC"
    )
    holder = replace(holder, **facts)
    lock = take(run_dir, holder)
    now = lock.path.stat().st_mtime
    os.utime(lock.path, (now - seconds, now - seconds))
    return lock.path


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "lock").iterdir())


# --- held ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_held_and_left_as_it_was(run_dir: Path, here: Holder) -> None:
    with holding(run_dir, here) as lock:
        assert names(run_dir) == ["000001.json"] and lock.is_own()
        lock.check()
    assert not run_dir.parent.exists()


def test_what_was_written_stays(run_dir: Path, here: Holder) -> None:
    with holding(run_dir, here):
        (run_dir / "log.txt").touch()
    assert [path.name for path in run_dir.iterdir()] == ["log.txt"]


def test_a_folder_that_was_there_stays(run_dir: Path, here: Holder) -> None:
    run_dir.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), holding(run_dir, here):
        1 / 0  # noqa: B018
    assert list(run_dir.iterdir()) == []


def test_the_second_is_refused_and_changes_nothing(run_dir: Path, here: Holder) -> None:
    with holding(run_dir, here):
        content = (run_dir / "lock" / "000001.json").read_bytes()
        for refused in (lambda: take(run_dir, this_process({})), lambda: refuse_if_held(run_dir, this_process({}))):
            with pytest.raises(UserError) as raised:
                refused()
            assert raised.value.place == "train.run_dir"
            assert f"{run_dir} is in use by process {os.getpid()} on {here.host}, since {here.since}" in str(
                raised.value
            )
            assert names(run_dir) == ["000001.json"] and (run_dir / "lock" / "000001.json").read_bytes() == content
    take(run_dir, this_process({}))


def test_nobody_holds_a_folder_without_locks(run_dir: Path, here: Holder) -> None:
    refuse_if_held(run_dir, here)
    assert not run_dir.exists()


def test_the_holder_touches_its_lock(run_dir: Path, here: Holder) -> None:
    """Ten minutes back and present again, without a limit of time that a busy machine could miss."""
    with holding(run_dir, here, seconds=0.01) as lock:
        old = lock.path.stat().st_mtime - 600
        os.utime(lock.path, (old, old))
        while lock.path.stat().st_mtime == old:
            threading.Event().wait(0.01)
        assert lock.path.stat().st_mtime > old + 500


def test_a_thread_that_lost_its_lock_does_not_touch_the_next_one(run_dir: Path, here: Holder) -> None:
    """Of the same name: the first holder is taken over, the second ends, the third is number 1 again."""
    with holding(run_dir, here, seconds=0.01) as lock:
        lock.path.unlink()
        third = of_another_host(run_dir, 300)
        assert third == lock.path
        before = third.stat().st_mtime
        threading.Event().wait(0.1)
        assert third.stat().st_mtime == before
    assert third.exists()  # nor does the first remove it at its end


# --- taken over ------------------------------------------------------------------------------------------------------


def test_a_lock_of_another_host_is_respected_for_ten_minutes(run_dir: Path, here: Holder) -> None:
    path = of_another_host(run_dir, 599)
    with pytest.raises(UserError) as raised:
        take(run_dir, here)
    said = str(raised.value)
    assert "in use by process 4321 on node7, job 55, since 2026-01-01 12:00:00 UTC, last heard of 599 s ago" in said
    assert "10 minutes after its last sign" in said
    assert path.exists() and names(run_dir) == ["000001.json"]


def test_a_lock_of_another_host_is_taken_over_after_ten_minutes(
    run_dir: Path, here: Holder, capsys: pytest.CaptureFixture[str]
) -> None:
    of_another_host(run_dir, 601)
    refuse_if_held(run_dir, here)
    with holding(run_dir, here):
        assert names(run_dir) == ["000002.json"]
    said = (
        f"{run_dir} is taken over from process 4321 on node7, job 55, since 2026-01-01 12:00:00 UTC: nothing was heard "
    )
    assert said + "of it for 10 minutes\n" in capsys.readouterr().err


def test_the_clock_of_the_host_does_not_matter(run_dir: Path, here: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an hour ahead of the file system's."""
    of_another_host(run_dir, 300)
    monkeypatch.setattr("time.time", lambda: 4e9)
    with pytest.raises(UserError, match="last heard of 300 s ago"):
        take(run_dir, here)


def test_a_damaged_lock_is_respected_as_long(run_dir: Path, here: Holder) -> None:
    path = of_another_host(run_dir, 0)
    path.write_bytes(b"\0")
    with pytest.raises(UserError, match=r"a process that .*000001\.json does not name"):
        take(run_dir, here)
    old = path.stat().st_mtime - 601
    os.utime(path, (old, old))
    assert take(run_dir, here).path.name == "000002.json"


def test_a_copied_folder_goes_by_the_same_rules(run_dir: Path, here: Holder, tmp_path: Path) -> None:
    """With the lock of a process that has ended: it is taken over at once."""
    take(run_dir, replace(here, pid=2**22 + 1))
    shutil.copytree(run_dir, tmp_path / "copy")
    take(tmp_path / "copy", here).check()


def test_a_holder_that_was_killed_while_it_took_over(run_dir: Path, here: Holder) -> None:
    """Both files are there: the next start judges both, and removes both."""
    first = of_another_host(run_dir, 700)
    content = first.read_bytes()
    ended = take(run_dir, replace(here, pid=2**22 + 1))
    first.write_bytes(content)  # as if it had not come to remove it
    with pytest.raises(UserError, match="node7"):
        take(run_dir, this_process({}))
    os.utime(first, (first.stat().st_mtime - 601,) * 2)
    assert names(run_dir) == ["000001.json", "000002.json"]
    assert take(run_dir, this_process({})).path.name == "000003.json" and not ended.is_own()
    assert names(run_dir) == ["000003.json"]


def test_a_holder_that_is_taken_over_has_lost(run_dir: Path, here: Holder) -> None:
    """It was stopped for ten minutes. Its end leaves the lock of the other."""
    with holding(run_dir, here) as lock:
        os.utime(lock.path, (lock.path.stat().st_mtime - 601,) * 2)
        with holding(run_dir, replace(this_process({}), host="node7")) as other:
            with pytest.raises(FolderLost) as raised:
                lock.check()
            assert str(raised.value).startswith(
                f"train.run_dir: {run_dir} is not this run's any more: now it is held by "
            )
            assert "on node7" in str(raised.value)
            other.check()
        with pytest.raises(FolderLost, match="any more; this process was silent"):
            lock.check()


def test_a_holder_whose_lock_is_removed_by_hand_has_lost(run_dir: Path, here: Holder) -> None:
    with holding(run_dir, here) as lock:
        shutil.rmtree(run_dir / "lock")
        with pytest.raises(FolderLost):
            lock.check()


def test_a_holder_that_wakes_up_while_it_is_judged_keeps_its_folder(
    run_dir: Path, here: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = of_another_host(run_dir, 601), locks._link

    def awake(*args: Any) -> bool:
        os.utime(path)
        return link(*args)

    monkeypatch.setattr(locks, "_link", awake)
    with pytest.raises(UserError, match="last heard of 0 s ago"):
        take(run_dir, here)
    assert names(run_dir) == ["000001.json"]


def test_a_holder_that_has_lost_writes_no_line(run_dir: Path, here: Holder) -> None:
    """Nor does a checkpoint get its name, before which the lines are synced."""
    with holding(run_dir, here) as lock:
        writer = MetricsWriter(run_dir, [], lock.check)
        writer.write(1, {"train/loss": 0.5})
        writer.sync()
        lock.path.unlink()
        for write in (lambda: writer.write(2, {"train/loss": 0.4}), writer.sync):
            with pytest.raises(FolderLost):
                write()
        writer.close()
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 0.5}\n'


@pytest.mark.parametrize("age", [0, 300, 560])
def test_a_run_that_torchrun_started_again_on_another_host_waits_for_the_last_sign(
    run_dir: Path, here: Holder, age: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the clock of the file system goes on by as much as is slept. Of a lock that was old already 50 seconds are
    watched too, but for one that gets 10 minutes old in this time.
    """
    path = of_another_host(run_dir, age, launch="big")
    slept = [0.0]
    monkeypatch.setattr(locks, "_now", lambda _: path.stat().st_mtime + age + sum(slept) if path.exists() else 0.0)
    monkeypatch.setattr(locks.time, "sleep", slept.append)
    take(run_dir, replace(here, launch="big"))
    assert sum(slept) == {0: 50, 300: 50, 560: 41}[age] and not path.exists()


@pytest.mark.parametrize("after", [1, 49])
def test_a_run_that_lives_keeps_its_folder_where_the_server_stalled(
    run_dir: Path, here: Holder, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 5 minutes, for both starts: the second one reads the lock before the touch of the holder lands."""
    path, slept = of_another_host(run_dir, 300, launch="100"), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) == after:
            os.utime(path)

    monkeypatch.setattr(locks.time, "sleep", sleep)
    with pytest.raises(UserError, match="is in use by process 4321 on node7"):
        take(run_dir, replace(here, launch="100"))
    assert names(run_dir) == ["000001.json"] and sum(slept) == after


def test_a_sign_after_the_wait_counts(run_dir: Path, here: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the lock has been watched, before the folder is taken."""
    path, link = of_another_host(run_dir, 300, launch="100"), locks._link

    def awake(*args: Any) -> bool:
        os.utime(path, (path.stat().st_mtime + 290,) * 2)
        return link(*args)

    monkeypatch.setattr(locks, "_link", awake)
    monkeypatch.setattr(locks.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="is in use by process 4321 on node7"):
        take(run_dir, replace(here, launch="100"))
    assert names(run_dir) == ["000001.json"]


def test_who_may_be_the_same_run_is_not_judged_before_the_input_is_read(run_dir: Path, here: Holder) -> None:
    """`take` waits for its sign, once."""
    of_another_host(run_dir, 30, launch="big")
    refuse_if_held(run_dir, replace(here, launch="big"))
    with pytest.raises(UserError):
        refuse_if_held(run_dir, replace(here, launch="other"))
    assert names(run_dir) == ["000001.json"]


def test_a_run_that_lost_its_folder_to_the_same_id_names_both_bounds(
    run_dir: Path, here: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.time, "sleep", lambda _: None)
    first = take(run_dir, replace(here, launch="big"))
    take(run_dir, replace(this_process({}), host="node7", launch="big"))
    with pytest.raises(FolderLost) as raised:
        first.check()
    assert str(raised.value).endswith(
        f"; this process was silent for 10 minutes, or for 50 s where the other start has the same --rdzv-id, or "
        f"{first.path} was removed"
    )


# --- file systems ----------------------------------------------------------------------------------------------------


def test_without_hard_links(run_dir: Path, here: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have none: the file is made under its name, which one alone can do as well."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(locks.os, "link", unsupported)
    with holding(run_dir, here) as lock:
        lock.check()
        with pytest.raises(UserError):
            take(run_dir, this_process({}))
        assert names(run_dir) == ["000001.json"]
    assert not run_dir.exists()


def test_nfs_may_say_that_the_name_was_taken_by_ourselves(
    run_dir: Path, here: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the first try was lost, and the second one met it."""
    link = os.link

    def twice(*args: Any) -> None:
        link(*args)
        link(*args)

    monkeypatch.setattr(locks.os, "link", twice)
    take(run_dir, here).check()
    with pytest.raises(UserError):
        take(run_dir, this_process({}))


def test_a_full_disk_is_told_with_the_path(run_dir: Path, here: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks.os, "fsync", full)
    with pytest.raises(OSError) as raised:
        take(run_dir, here)
    assert Path(str(raised.value.filename)).parent == run_dir / "lock" and names(run_dir) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("ask", [take, refuse_if_held])
def test_a_folder_that_became_read_only_is_the_users(
    run_dir: Path, here: Holder, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Path, Holder], object], code: int
) -> None:
    """With the lock of a process that was killed."""
    take(run_dir, replace(here, pid=2**22 + 1))
    opened = Path.open

    def read_only(path: Path, mode: str = "r", **others: Any) -> Any:
        if "r" not in mode:
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, mode, **others)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(UserError) as raised:
        ask(run_dir, here)
    assert str(raised.value).startswith(f"train.run_dir: {run_dir}: cannot write to {run_dir}/lock/.{here.token}.draft")
    assert str(raised.value).endswith(f": {os.strerror(code)}; valid: a folder to write in")


def test_a_name_that_leads_nowhere_is_passed_over(run_dir: Path, here: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link whose target is gone is nobody's lock; its name is taken all the same."""
    (run_dir / "lock").mkdir(parents=True)
    (run_dir / "lock" / "000001.json").symlink_to(run_dir / "gone")
    real, tries = locks._try_to_take, []

    def counted(*args: Any) -> Any:
        tries.append(args)
        assert len(tries) < 10
        return real(*args)

    monkeypatch.setattr(locks, "_try_to_take", counted)
    with holding(run_dir, here) as lock:
        assert lock.path.name == "000002.json"
        lock.check()


# --- races -----------------------------------------------------------------------------------------------------------

ROUNDS, TAKERS = 60, 6


def race(run_dir: Path, prepare: Callable[[Path], object]) -> list[int]:
    """How many of TAKERS threads hold a folder, in each of ROUNDS rounds. They all are ready before the first one is
    let go, and a winner holds until all have tried; -1: one holds what is another's.
    """
    winners = []
    for number in range(ROUNDS):
        folder = run_dir / str(number)
        prepare(folder)
        ready, tried, won = threading.Barrier(TAKERS), threading.Barrier(TAKERS), list[bool]()

        def try_it(folder: Path, ready: threading.Barrier, tried: threading.Barrier, won: list[bool]) -> None:
            me, mine = this_process({}), list[Lock]()
            with ExitStack() as stack:
                ready.wait()
                try:
                    mine.append(stack.enter_context(holding(folder, me)))
                except UserError:
                    pass
                finally:
                    tried.wait()
                won.extend(lock.is_own() for lock in mine)

        threads = [threading.Thread(target=try_it, args=(folder, ready, tried, won)) for _ in range(TAKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners.append(len(won) if all(won) else -1)
    return winners


@pytest.mark.parametrize("kind", ["new", "silent"])
def test_of_many_takers_one_wins(run_dir: Path, kind: str) -> None:
    def prepare(folder: Path) -> None:
        if kind == "silent":
            of_another_host(folder, 700)

    assert race(run_dir, prepare) == [1] * ROUNDS


@pytest.mark.parametrize("told", [errno.EEXIST, errno.ENOENT])
def test_a_folder_that_another_start_removes_while_it_is_made(
    run_dir: Path, here: Holder, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mkdir(2) finds RUN/lock, which is gone when pathlib looks at it; or RUN is gone when RUN/lock is made in it."""
    real, failures = os.mkdir, [told]

    def mkdir(path: Path, mode: int = 0o777) -> None:
        if path == run_dir / "lock" and run_dir.is_dir() and failures:
            if failures.pop() == errno.ENOENT:
                run_dir.rmdir()
            else:
                raise FileExistsError(errno.EEXIST, "File exists", str(path))
        real(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with holding(run_dir, here) as lock:
        assert lock.is_own() and not failures


def test_locks_that_another_start_removes_while_they_are_listed(
    run_dir: Path, here: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 finds RUN/lock, and raises where that is gone when it lists it."""
    glob, gone = Path.glob, [True]

    def listed(path: Path, pattern: str) -> Any:
        if gone and path == run_dir / "lock":
            gone.pop()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return glob(path, pattern)

    monkeypatch.setattr(Path, "glob", listed)
    refuse_if_held(run_dir, here)
    gone.append(True)
    with holding(run_dir, here) as lock:
        lock.check()


def test_a_file_in_the_place_of_a_folder_is_refused(run_dir: Path, here: Holder) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / "lock").write_text("mine")
    with pytest.raises(UserError, match=r"train\.run_dir.*lock.*File exists"), holding(run_dir, here):
        pass
    assert (run_dir / "lock").read_text() == "mine"


def count_alone(run_dir: Path, counter: Path, rounds: int) -> None:
    """Takes and leaves a folder many times; while it holds it, adds one to a file, without any other lock."""
    done = 0
    while done < rounds:
        try:
            with holding(run_dir, this_process({})) as lock:
                number = int(counter.read_text())
                os.sched_yield()
                lock.check()
                counter.write_text(str(number + 1))
                done += 1
        except UserError:
            os.sched_yield()


def test_processes_that_take_and_leave_a_folder_exclude_each_other(run_dir: Path, tmp_path: Path) -> None:
    """No addition is lost: 3 processes, 100 times each; numbers begin again at 1 after each."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    run_dir.mkdir(parents=True)
    processes = [start(count_alone, run_dir, counter, 100) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.read_text() == "300"
    assert not list(run_dir.iterdir())
