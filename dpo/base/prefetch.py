"""A thread builds the next item while the caller, and its device, work on the current one."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Built = TypeVar("Built")


def prefetch(
    build: Callable[[Item], Built], items: Iterable[Item], prepare: Callable[[], None]
) -> Generator[Built, None, None]:
    """Yields `build(item)` for each item in order. A thread builds one item ahead of the caller.

    Close the generator if you leave it early (`contextlib.closing`), else its thread keeps running.

    Args:
        build: runs in the thread; an exception is raised where its result would have been yielded.
        items: iterated in the caller's thread.
        prepare: runs once in the thread, before the first item.
    """
    with ThreadPoolExecutor(1, "prefetch", prepare) as pool:
        ahead: Future[Built] | None = None
        for item in items:
            following = pool.submit(build, item)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
