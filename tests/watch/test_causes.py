"""Which rank the others wait for, from what is seen of them."""

from dataclasses import replace

import pytest

from dpo.watch.causes import Cause, find_cause, held_up, silent
from dpo.watch.slots import DONE, ELSEWHERE, FAILED, IN, LOST, NOT_HEARD, TOGETHER, Seen
from dpo.watch.watcher import trouble

WAITS = "torch/distributed/fsdp/x.py:1 in wait"


def rank(number: int, **changes: object) -> Seen:
    """A rank in the fourth step's forward pass, its tenth place, which waits for the others."""
    fine = Seen(
        rank=number,
        host="n1",
        pid=100 + number,
        started="1",
        namespace="pid:[1]",
        error_file="",
        silence=0.3,
        limit=20.0,
        count=10,
        step=4,
        micro_batch=0,
        age=1.0,
        phase="the forward pass",
        end=IN,
        ended=1000.0,
        words="",
        frame=WAITS,
        process="S",
    )
    return replace(fine, **changes)  # type: ignore[arg-type]


STOPPED = rank(1, silence=20.4, process="T", frame="")
GONE = rank(1, process="", silence=0.9)
HANGS = rank(1, count=9, age=21.0, phase="the reading of the batch", frame="a.py:1 in f")
WRONG = rank(1, end=FAILED, ended=2.0, words="ValueError: x", process="")


@pytest.mark.parametrize(
    ("seen", "waited", "line"),
    [
        ([STOPPED], True, "no sign of life for 20 s: stopped (SIGSTOP), in the forward pass of step 4"),
        ([replace(STOPPED, process="R")], True, "and holds Python's lock, in the forward pass of step 4"),
        ([replace(STOPPED, process=ELSEWHERE)], True, "20 s: its process is in another container, in the forward pass"),
        ([replace(STOPPED, process="D")], True, "waits for the kernel, in a file system or a driver, in the forward"),
        ([replace(STOPPED, silence=6.0)], True, "no sign of life for 6 s"),
        ([replace(STOPPED, silence=6.0)], False, "no sign of life for 6 s"),
        ([replace(STOPPED, silence=3.0, process=NOT_HEARD)], False, "no sign of life for 3 s: nothing is heard of its"),
        ([GONE], False, "its process ended in the forward pass of step 4"),
        ([replace(GONE, process="Z")], True, "its process ended in the forward pass of step 4"),
        ([HANGS], True, "in the reading of the batch of step 4 for 21 s, at a.py:1 in f, where the other"),
        ([replace(HANGS, count=10)], True, "in the reading of the batch of step 4 for 21 s"),
        ([WRONG], False, "ValueError: x"),
    ],
)
def test_the_rank_that_the_others_wait_for(seen: list[Seen], waited: bool, line: str) -> None:
    """Beside two that wait."""
    cause = find_cause([rank(0), *seen, rank(2)], waited)
    assert cause is not None and str(cause).startswith("rank 1 on n1: ") and line in str(cause)


@pytest.mark.parametrize(
    ("seen", "waited"),
    [
        ([rank(1)], True),  # all wait in the same place
        ([replace(HANGS, age=0.1)], False),  # a connection was closed: who is behind says nothing
        ([rank(1, end=DONE, process="")], True),
        ([rank(1, end=TOGETHER, process="", silence=60.0)], True),
        ([replace(STOPPED, silence=4.0)], False),
    ],
)
def test_nobody_is_blamed_without_a_reason(seen: list[Seen], waited: bool) -> None:
    assert find_cause([rank(0), *seen], waited) is None


def test_the_first_failure_wins() -> None:
    """A rank's own failure before a stopped rank, the earlier before the later, what another has found first."""
    earlier = rank(3, end=FAILED, ended=5.0, words="OSError: y")
    assert str(find_cause([rank(0), WRONG, earlier, replace(STOPPED, rank=2)], True)) == "rank 3 on n1: OSError: y"
    assert str(find_cause([rank(0), replace(GONE, rank=2, silence=9.0), WRONG], False)) == "rank 1 on n1: ValueError: x"
    told = rank(2, end=LOST, ended=1.0, words="1 no sign of life")
    assert str(find_cause([rank(0), HANGS, told], False)) == "rank 1 on n1: no sign of life"


def test_a_rank_is_late_by_its_own_limit() -> None:
    """While it reads the input it has longer."""
    assert silent([rank(0), STOPPED]) is not None
    assert silent([rank(0), replace(STOPPED, limit=7200.0)]) is None


def test_whom_nccl_has_aborted_for() -> None:
    """SIGABRT without a word: the rank that has been in an earlier place for as long as the timeout."""
    cause = held_up(replace(rank(0), process=""), [HANGS, rank(2)])
    assert cause is not None and cause.rank == HANGS
    assert held_up(replace(rank(0), process=""), [replace(HANGS, age=2.0)]) is None


@pytest.mark.parametrize(
    ("seen", "end", "why"),
    [
        ([rank(0), rank(1)], None, None),
        ([rank(0, end=TOGETHER), rank(1)], None, None),  # rank 1 may still wait for trackers
        ([rank(0, end=DONE, process=""), rank(1)], None, None),
        ([rank(0), WRONG], None, "rank 1 on n1: ValueError: x"),
        ([rank(0), GONE], None, "rank 1 on n1: its process ended in the forward pass of step 4"),
        ([rank(0, end=LOST), rank(1)], None, "another rank was lost"),
        (
            [rank(0), rank(1)],
            (-1, "the torchrun of the first node has ended"),
            "the torchrun of the first node has ended",
        ),
        ([rank(0), rank(1)], (1, "in the update"), "rank 1 on n1: in the update"),
    ],
)
def test_why_the_watcher_ends_the_others(seen: list[Seen], end: tuple[int, str] | None, why: str | None) -> None:
    found = trouble(seen, end)
    assert (str(found) if found else None) == why
    assert isinstance(found, Cause) == (why is not None and why.startswith("rank"))
