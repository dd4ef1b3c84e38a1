"""One rank decides, all follow; every rank must get to each of these functions, or the rest hang."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dpo.base.command import line_of
from dpo.base.errors import RunError, UserError
from dpo.distributed.world import World

T = TypeVar("T")


def together(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; if it failed on any, every rank raises the failure of the lowest one.

    Every rank must get here, or the rest hang.
    """
    result, failure = _attempt(work)
    failures = [f for f in all_gather(failure) if f is not None]
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]  # no failure: a result, which may be None


def on_main(world: World, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `work` on rank 0 alone and gives its result, or its failure, to every rank, over the default group or
    another one of all ranks. Every rank must get here.
    """
    outcome: list[Any] = [_attempt(work) if world.is_main else None]
    dist.broadcast_object_list(outcome, src=0, group=group)
    result: T
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result


def first_on_each_node(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0, then on the first rank of every other node, then on the rest: each finds in the caches of
    its node, or of all where these are shared, what those before it left.

    Every rank must get here; a failure anywhere is raised everywhere.
    """
    turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    results = [together(work if turn == now else _nothing) for now in range(3)]
    return results[turn]  # type: ignore[return-value]  # this rank's turn ran `work`


def _nothing() -> None:
    """What a rank does while others work."""


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of `work`, or its failure where that is one to tell the user; other exceptions are bugs and escape."""
    try:
        return work(), None
    except (UserError, RunError) as failure:
        return None, failure
    except OSError as failure:
        return None, RunError(line_of(failure))


def all_gather(value: T) -> list[T]:
    """The values of all ranks, by rank. Every rank must get here."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_lanes(value: T) -> list[T]:
    """Returns the values of all lanes, by lane: data that a lane holds counts once, however many ranks share it. Every
    rank must get here, or the rest hang.
    """
    return all_gather(value)  # each lane is one rank
