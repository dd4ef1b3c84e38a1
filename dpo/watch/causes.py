"""Which rank the others wait for, and why: pure functions of what is seen of the ranks (`dpo.watch.slots`).

    a rank                                                       blamed
    has left with a failure of its own                           always, the first one
    is there no more, and did not say that it leaves             always
    has given no sign of life: stopped, or Python's lock held    once its limit is over, and where others waited in vain
    lives, but has come to fewer places than the others          where others waited in vain

Without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dpo.watch.slots import ELSEWHERE, FAILED, IN, LOST, NOT_HEARD, Seen, still_in

QUIET_SECONDS = 5.0
"""Silence of a rank that says something where others have waited for it in vain: it gives a sign twice a second."""

STATES = {
    "T": "stopped (SIGSTOP)",
    "t": "stopped by a debugger",
    "D": "its process waits for the kernel, in a file system or a driver",
    "R": "its process computes",
    "S": "its process sleeps",
    ELSEWHERE: "its process is in another container",
    NOT_HEARD: "nothing is heard of its node",
}
"""State of a process -> words."""


@dataclass(frozen=True)
class Cause:
    """The rank for which the others wait, and why."""

    rank: Seen
    words: str
    is_silent: bool = False
    """The rank is there and cannot say so itself: its failure is recorded by those who see it."""

    def __str__(self) -> str:
        return f"rank {self.rank.rank} on {self.rank.host}: {self.words}"


def find_cause(seen: Sequence[Seen], waited: bool) -> Cause | None:
    """Returns the rank to blame for the failure of a rank that lost another one; None where it cannot be told.

    Args:
        seen: of all ranks that can be seen, the own one among them.
        waited: whether the rank has waited in vain; False: a connection was closed.
    """
    cause = failed(seen) or told(seen) or vanished(seen) or silent(seen) or silent(seen, QUIET_SECONDS)
    return cause or (behind(seen) if waited else None)


def failed(seen: Sequence[Seen]) -> Cause | None:
    """Returns the rank that failed first by itself."""
    ranks = [rank for rank in seen if rank.end == FAILED]
    first = max(ranks, key=lambda rank: rank.ended, default=None)
    return Cause(first, first.words) if first else None


def told(seen: Sequence[Seen]) -> Cause | None:
    """Returns the cause that the first of the ranks found that lost another one."""
    for rank in sorted(seen, key=lambda rank: -rank.ended):
        if rank.end == LOST and rank.words:
            number, _, words = rank.words.partition(" ")
            return next((Cause(other, words) for other in seen if str(other.rank) == number), None)
    return None


def vanished(seen: Sequence[Seen]) -> Cause | None:
    """Returns a rank whose process has ended without a word, the one that gave no sign of life for longest."""
    ranks = [rank for rank in seen if rank.end == IN and rank.is_gone]
    first = max(ranks, key=lambda rank: rank.silence, default=None)
    return Cause(first, f"its process ended in {first.place}") if first else None


def silent(seen: Sequence[Seen], after: float | None = None) -> Cause | None:
    """Returns the rank that has given no sign of life for longest.

    Args:
        seen: the ranks.
        after: seconds of silence; None: the limit of the rank.
    """
    ranks = [rank for rank in still_in(seen) if rank.silence >= _patience(rank, after)]
    first = max(ranks, key=lambda rank: rank.silence, default=None)
    if first is None:
        return None
    lock = " and holds Python's lock" if first.process in "RS" else ""  # without which no thread gives a sign
    state = f"{STATES.get(first.process, f'its process is in state {first.process}')}{lock}"
    return Cause(first, f"no sign of life for {first.silence:.0f} s: {state}, in {first.place}", is_silent=True)


def _patience(rank: Seen, after: float | None) -> float:
    if after is None:
        return rank.limit
    return 0.0 if rank.process == NOT_HEARD else after


def behind(seen: Sequence[Seen]) -> Cause | None:
    """Returns the rank that has come to fewer places than all others, or alone does not wait in a collective."""
    last = min(still_in(seen), key=_progress, default=None)
    others = [_progress(rank) for rank in seen if rank is not last and rank.end in (IN, LOST)]
    return _waited_for(last) if last and others and _progress(last) < min(others) else None


def held_up(gone: Seen, seen: Sequence[Seen]) -> Cause | None:
    """Returns the rank for which a rank has waited that is gone without a word: NCCL aborts a rank (SIGABRT) that has
    waited for its timeout. None where it has not waited for any.
    """
    ranks = [rank for rank in still_in(seen) if rank.count < gone.count and rank.age > 0.8 * rank.limit]
    last = min(ranks, key=_progress, default=None)
    return _waited_for(last) if last else None


def _progress(rank: Seen) -> tuple[int, bool]:
    """Returns the places that a rank has come to, and whether its main thread waits in torch's collectives."""
    return rank.count, "torch/distributed/" in rank.frame


def _waited_for(rank: Seen) -> Cause:
    frame = f", at {rank.frame}" if rank.frame else ""
    return Cause(rank, f"in {rank.place} for {rank.age:.0f} s{frame}, where the other ranks are done", is_silent=True)
