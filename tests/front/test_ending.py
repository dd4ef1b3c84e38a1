"""The exit code and the last line of each way in which ranks end, and the signals that a parent hears."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from dpo.command.blame import Failure
from dpo.front import stops
from dpo.front.ending import End, Verdict, is_time_to_kill, judge
from dpo.front.names import Command
from dpo.front.stops import ASKING, noted_stops

INT, TERM, HUP, USR2 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2
TRAINING = {"state": "training", "step": 5}
SAVED = {"state": "preempted", "step": 7, "saved": True}
UNSAVED = {"state": "preempted", "step": 4, "saved": False}
DONE = {"state": "done"}

STEP_7 = "step 7 is saved: the same command goes on from there"
COMPLETE = "the run is complete"
NOT_SAVED = "the ranks were ended before they had saved: AFTER"
NOTHING = "BEFORE; AFTER"


def failed(rank: int, **changes: Any) -> Failure:
    """A failure of a rank."""
    return Failure(**({"host": "n1", "rank": rank, "time": 10.0 + rank, "message": "ValueError: x"} | changes))


USERS = failed(0, told="a.yaml: loss.beta: wrong", user_line="a.yaml: loss.beta: wrong", exit_code=2)
BUG, KILLED = failed(0), failed(1, message="killed by SIGKILL", killed_by=9)
SEGFAULT = failed(0, message="killed by SIGSEGV", killed_by=11)
BUG_LINE = "rank 0 on n1: ValueError: x"
KILLED_LINE = "rank 1 on n1: killed by SIGKILL; often by the kernel, where host memory runs out; AFTER"


@pytest.mark.parametrize(
    ("end", "verdict"),
    [
        # a failure comes before all else
        (End(failures=[SEGFAULT]), Verdict(1, error="rank 0 on n1: killed by SIGSEGV; AFTER")),
        (End(failures=[BUG]), Verdict(1, error=BUG_LINE)),
        (End(failures=[KILLED]), Verdict(1, error=KILLED_LINE)),
        (End((TERM,), TRAINING, [BUG]), Verdict(1, error=BUG_LINE)),
        (End((TERM,), SAVED, [KILLED]), Verdict(1, error=KILLED_LINE)),
        (End((INT,), DONE, [KILLED]), Verdict(1, error=KILLED_LINE)),
        # saved, whoever asked, and also where a second signal came while the ranks ended
        (End((INT,), SAVED), Verdict(130, stop=STEP_7)),
        (End((TERM,), SAVED), Verdict(0, stop=STEP_7)),
        (End((HUP,), SAVED), Verdict(0, stop=STEP_7)),
        (End((), SAVED), Verdict(0, stop=STEP_7)),
        (End((TERM, TERM), SAVED, is_killed=True), Verdict(0, stop=STEP_7)),
        (End((INT, INT), SAVED, is_killed=True), Verdict(130, stop=STEP_7)),
        (End((TERM, INT), SAVED), Verdict(0, stop=STEP_7)),
        # done
        (End(), Verdict(0)),
        (End(status=DONE), Verdict(0)),
        (End((INT,), DONE), Verdict(130, stop=COMPLETE)),
        (End((TERM,), DONE), Verdict(0, stop=COMPLETE)),
        (End((TERM, TERM), DONE, is_killed=True), Verdict(0, stop=COMPLETE)),
        # ended well, and could not say how
        (End(status=TRAINING), Verdict(0)),
        (End((TERM,), TRAINING), Verdict(0, stop="AFTER")),
        (End((INT,), TRAINING), Verdict(130, stop="AFTER")),
        # killed after the first step
        (End((INT, INT), TRAINING, is_killed=True), Verdict(130, stop=NOT_SAVED)),
        (End((TERM, INT), TRAINING, is_killed=True), Verdict(143, stop=NOT_SAVED)),
        # before the first step
        (End((INT,), is_killed=True), Verdict(130, stop=NOTHING)),
        (End((TERM,), is_killed=True), Verdict(143, stop=NOTHING)),
        (End((HUP,), is_killed=True), Verdict(129, stop=NOTHING)),
        (End((INT,), UNSAVED), Verdict(130, stop=NOTHING)),
        (End((TERM,), UNSAVED), Verdict(143, stop=NOTHING)),
        (End((), UNSAVED), Verdict(140, stop=NOTHING)),
    ],
)
def test_the_exit_code_and_the_last_line(end: End, verdict: Verdict) -> None:
    assert judge(end, Command("m", "about", after_stop="AFTER", before_steps="BEFORE; ")) == verdict


@pytest.mark.parametrize(
    ("num_stops", "status", "kills"),
    [
        (0, {}, False),
        (1, {}, True),
        (1, TRAINING, False),
        (1, SAVED, False),
        (1, DONE, False),
        (2, TRAINING, True),
        (2, SAVED, True),
    ],
)
def test_when_the_ranks_are_killed(num_stops: int, status: dict[str, Any], kills: bool) -> None:
    assert is_time_to_kill(num_stops, status) is kills


OOM = failed(1, told="rank 1: out of memory")


@pytest.mark.parametrize(
    ("failures", "verdict"),
    [
        # rank 0 has said it for all
        ([USERS, failed(1, told=USERS.told, exit_code=2)], Verdict(2, USERS.told, is_printed=True, is_logged=True)),
        # said by rank 1, and nothing came after it; the log of rank 0 lacks it
        ([OOM, failed(0, killed_by=15)], Verdict(1, OOM.told, is_printed=True)),
        ([OOM, failed(0, time=12.0, told="rank 0: lost", message="Connection closed by peer")], Verdict(1, OOM.told)),
        ([KILLED], Verdict(1, KILLED_LINE.removesuffix("; AFTER"))),
        ([failed(0, message="KeyError: 'x'", traceback="Traceback ...")], Verdict(1, "rank 0 on n1: KeyError: 'x'")),
    ],
)
def test_which_ranks_have_said_the_error(failures: list[Failure], verdict: Verdict) -> None:
    assert judge(End(failures=failures), Command("m", "about")) == verdict


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers of the tests' own process are as before after the test."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers: int) -> None:
    """This process gets signals, and has handled each before the next."""
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.usefixtures("handlers")
def test_what_is_ignored_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """nohup and a shell's `&` are obeyed; SIGUSR2, which a training in the process above leaves ignored, is heard."""
    monkeypatch.setattr(stops, "ONE_STOP_SECONDS", 0)
    for number in (INT, HUP, USR2):
        signal.signal(number, signal.SIG_IGN)
    with noted_stops() as noted:
        send(INT, HUP, USR2)
        assert noted == [USR2]


@pytest.mark.usefixtures("handlers")
def test_a_late_signal_changes_nothing() -> None:
    """One that comes when the exit code is decided: SIGTERM would kill the test, and Ctrl-C raise in it."""
    with noted_stops() as noted:
        pass
    send(*ASKING)
    assert noted == []


@pytest.mark.usefixtures("handlers")
def test_signals_within_a_second_are_one_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """timeout(1) sends SIGTERM twice. The seconds are counted from the last stop, at 10.0 and at 11.0."""
    times = iter([10.0, 10.0, 10.99, 11.0, 11.5])
    monkeypatch.setattr(stops, "monotonic", lambda: next(times))
    with noted_stops() as noted:
        send(TERM, TERM, HUP, INT, TERM)
    assert noted == [TERM, INT]
