"""What a rank writes of itself, as others see it."""

import errno
import os
import sys
import threading
from pathlib import Path

import pytest

from dpo.command.blame import Failure, first_cause, place_of_killed, read_error
from dpo.watch import watcher
from dpo.watch.beats import frame_in_words
from dpo.watch.causes import Cause, silent
from dpo.watch.slots import DONE, ELSEWHERE, FAILED, IN, LOST, Slot, condemn, look, still_in
from dpo.watch.watcher import record, record_end, write_place


def slot(folder: Path, rank: int = 1, limit: float = 20.0) -> Slot:
    """Of this process."""
    file = folder / str(rank) / "error.json"
    file.parent.mkdir()
    return Slot(folder, {"rank": rank, "host": "n1", "error_file": str(file)}, limit)


def test_a_place_is_seen_in_words(tmp_path: Path) -> None:
    own = slot(tmp_path)
    assert [(rank.place, rank.count, rank.end) for rank in look(tmp_path)] == [("setup", 1, IN)]
    own.show("f.py:1 in f")
    assert look(tmp_path)[0].frame == "f.py:1 in f"
    own.stand("the forward pass", 4, 2)
    (seen,) = look(tmp_path)
    assert (seen.place, seen.count, seen.frame) == ("the forward pass of step 4, micro-batch 2", 2, "")
    assert (seen.pid, seen.is_gone, seen.limit) == (os.getpid(), False, 20.0) and seen.silence < 60
    assert still_in([seen]) == [seen]


def test_the_first_word_on_the_end_counts(tmp_path: Path) -> None:
    own = slot(tmp_path)
    own.leave(FAILED, "ValueError: x")
    own.leave(LOST, "later")
    (seen,) = look(tmp_path)
    assert (seen.end, seen.words) == (FAILED, "ValueError: x") and not still_in([seen])
    other = slot(tmp_path, rank=2)
    condemn(tmp_path, 2, "no sign of life")
    other.leave(DONE)
    assert (look(tmp_path)[1].end, look(tmp_path)[1].words) == (FAILED, "no sign of life")


def test_another_process_with_the_same_id_is_not_the_rank(tmp_path: Path) -> None:
    """A process that started at another time: the rank is gone."""
    slot(tmp_path)
    file = tmp_path / "rank-1"
    started = look(tmp_path)[0].started
    file.write_bytes(file.read_bytes().replace(f'"{started}"'.encode(), f'"{"9" * len(started)}"'.encode()))
    assert look(tmp_path)[0].is_gone


def test_a_silent_rank_is_blamed_before_those_that_lost_it_and_the_job_starts_again(tmp_path: Path) -> None:
    """By the error files that the watcher writes for both; what stands in one already stays."""
    slot(tmp_path, limit=0.0)
    slot(tmp_path, rank=0)
    late, other = silent(look(tmp_path)), look(tmp_path)[0]
    assert late is not None and late.rank.rank == 1
    record_end(other, str(late))
    record(late)
    record(Cause(late.rank, "another reason"))
    failures = [read_error(Path(rank.error_file), "n1", rank.rank) for rank in look(tmp_path)]
    first = first_cause(failures)
    assert first is not None and str(first) == str(late) and first.told == str(late)
    assert first.is_silent and first.blame == 0 and not first.is_exception
    assert failures[0].is_consequence and failures[0].blame == 2 and str(late) in failures[0].message


def test_where_a_killed_rank_was(tmp_path: Path) -> None:
    """Only a watcher knows it: without one nobody waits for its word."""
    slot(tmp_path).stand("the update", 3, 0)
    (seen,) = look(tmp_path)
    error_file = Path(seen.error_file)
    assert place_of_killed(error_file) == ""
    write_place(seen)
    assert place_of_killed(error_file) == "the update of step 3"
    assert str(Failure("n1", 1, 0.0, "killed by SIGKILL", killed_by=9, place="the update of step 3")) == (
        "rank 1 on n1: killed by SIGKILL, in the update of step 3"
    )


def test_what_a_thread_does_in_words() -> None:
    """The innermost frame; here none of the package has called it, so nothing else."""
    words = frame_in_words(sys._getframe())
    assert words.startswith("tests/watch/test_slots.py:") and words.split(", called from ")[0].endswith(
        "in test_what_a_thread_does_in_words"
    )


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ids that the watcher kills."""
    pids: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: pids.append(pid))
    return pids


def look_again(watch: watcher.Watcher, folder: Path, seconds: float = 1.0) -> None:
    """A look of the watcher, so many seconds after the one before."""
    watch.suspects = {rank: since - seconds for rank, since in watch.suspects.items()}
    watch.act(look(folder), None)


def test_the_watcher_says_why_before_it_kills(tmp_path: Path, killed: list[int]) -> None:
    """A rank that loses the killed one then finds the reason; the others are killed once their grace is over."""
    slot(tmp_path, limit=0.0)
    slot(tmp_path, rank=0)
    watch = watcher.Watcher(tmp_path)
    look_again(watch, tmp_path)
    look_again(watch, tmp_path)
    other, late = look(tmp_path)
    assert killed == [os.getpid()] and late.end == FAILED and late.words.startswith("no sign of life for 0 s: ")
    look_again(watch, tmp_path)
    assert len(killed) == 1
    watch.since -= watcher.GRACE_SECONDS
    look_again(watch, tmp_path)
    assert len(killed) == 2 and "no sign of life" in Path(other.error_file).read_text()


def test_one_look_kills_nobody(tmp_path: Path, killed: list[int]) -> None:
    """After a pause of the whole node every rank was silent for as long, and gives a sign half a second later."""
    own, watch = slot(tmp_path, limit=0.0), watcher.Watcher(tmp_path)
    look_again(watch, tmp_path)
    look_again(watch, tmp_path, 0.9)
    own.set_limit(20.0)
    look_again(watch, tmp_path)
    own.set_limit(0.0)
    look_again(watch, tmp_path, 0.0)
    assert not killed and watch.why == ""


def test_a_pause_that_the_watcher_shared_kills_nobody(tmp_path: Path, killed: list[int]) -> None:
    """The ranks have ten seconds for a sign, since a node that goes on may be busy; then two looks decide."""
    slot(tmp_path, limit=0.0)
    watch = watcher.Watcher(tmp_path)
    look_again(watch, tmp_path)
    watch.looked -= watcher.PAUSE_SECONDS
    for _ in range(3):
        look_again(watch, tmp_path)
    assert not killed and not watch.suspects
    watch.resumed -= watcher.PAUSE_SECONDS
    for _ in range(2):
        look_again(watch, tmp_path)
    assert killed == [os.getpid()]


@pytest.mark.parametrize("is_stalled", [False, True])
def test_a_full_or_stalled_disk_keeps_no_rank_alive(
    is_stalled: bool, tmp_path: Path, killed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()

    def fail(*_: object, **__: object) -> None:
        if is_stalled:
            never.wait()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    slot(tmp_path, limit=0.0)
    slot(tmp_path, rank=0)
    watch = watcher.Watcher(tmp_path)
    look_again(watch, tmp_path)
    monkeypatch.setattr(Path, "write_text", fail)
    monkeypatch.setattr(watcher, "_WRITE_SECONDS", 0.1)
    look_again(watch, tmp_path)
    watch.since -= watcher.GRACE_SECONDS
    look_again(watch, tmp_path)
    never.set()
    assert len(killed) == 2 and not list(tmp_path.glob("*/error.json"))


def test_a_process_of_another_container_is_not_judged_by_its_id(tmp_path: Path, killed: list[int]) -> None:
    """Nor killed: here that is another process, or none. The watcher still says that the rank fell silent."""
    slot(tmp_path, limit=0.0)
    file = tmp_path / "rank-1"
    own = look(tmp_path)[0].namespace.encode()
    file.write_bytes(file.read_bytes().replace(own, b"pid:[1]".ljust(len(own), b"_")).replace(b'"pid": ', b'"pid":9'))
    (seen,) = look(tmp_path)
    assert own and seen.process == ELSEWHERE and not seen.is_gone and still_in([seen]) == [seen]
    watch = watcher.Watcher(tmp_path)
    look_again(watch, tmp_path)
    look_again(watch, tmp_path)
    assert not killed and "its process is in another container" in look(tmp_path)[0].words
