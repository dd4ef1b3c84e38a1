"""What comes next is built by a thread while the device works on what is here."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Built = TypeVar("Built")


def prefetch(
    build: Callable[[Item], Built], items: Iterable[Item], prepare: Callable[[], None]
) -> Generator[Built, None, None]:
    """`build(item)` of each item in order, always one ahead of the one that is asked for; what it raises is raised
    where its result would have come.

    The thread calls `prepare` once, before the first item. Close the generator where it is left early
    (`contextlib.closing`), so that no thread goes on unseen.
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
