"""Exchanges of Python objects and failures between ranks. Every rank must get to each function, or the rest hang."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dpo.base.errors import RunError, UserError
from dpo.command.exits import is_told, line_of
from dpo.distributed.world import World

T = TypeVar("T")


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `work` on every rank and returns this rank's result. If `work` fails on any rank, every rank raises the
    failure of the lowest rank that failed.

    Every rank must get here, or the rest hang. `group`: a process group of all ranks; None: the default group.
    """
    result, failure = _attempt(work)
    failures = [f for f in all_gather(failure, group) if f is not None]
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]  # no failure: a result, which may be None


def on_main(world: World, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `work` on rank 0 alone and broadcasts its result, or its failure, which every rank then raises.

    Every rank must get here, or the rest hang.

    Args:
        world: the ranks of the run.
        work: its result must be picklable.
        group: a process group of all ranks; None: the default group.
    """
    outcome: list[Any] = [_attempt(work) if world.is_main else None]
    dist.broadcast_object_list(outcome, src=0, group=group)
    result: T
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result


def first_on_each_node(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0, then on the first rank of every other node, then on all other ranks, and returns this
    rank's result. Later ranks find the results of earlier ranks in the cache of their node, or in a shared cache.

    Every rank must get here, or the rest hang. A failure on any rank is raised on all.
    """
    turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    results = [together(work if turn == now else _do_nothing) for now in range(3)]
    return results[turn]  # type: ignore[return-value]  # this rank's turn ran `work`


def _do_nothing() -> None:
    """Takes the place of `work` while other ranks run it."""


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Returns (the result of `work`, None), or (None, its failure) if the failure is meant for the user. Any other
    exception is a bug and propagates.
    """
    try:
        return work(), None
    except (UserError, RunError) as failure:
        return None, failure
    except Exception as failure:
        if not is_told(failure):
            raise
        return None, RunError(line_of(failure))


def all_gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the values of all ranks, by rank. Every rank must get here, or the rest hang.

    `group`: a process group of all ranks; None: the default group.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


ONE_OF_EACH_LANE = slice(None)
"""The ranks whose data count, one per lane: all of them, since each lane is one rank."""


def gather_lanes(value: T) -> list[T]:
    """Returns the values of all lanes, by lane, so that data of a lane counts once, however many ranks share the lane.

    Every rank must get here, or the rest hang.
    """
    return all_gather(value)[ONE_OF_EACH_LANE]
