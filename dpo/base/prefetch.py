"""What comes next is built by a thread while the device works on what is here."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Built = TypeVar("Built")


def prefetch(
    build: Callable[[Item], Built], items: Iterable[Item], device: torch.device
) -> Generator[Built, None, None]:
    """`build(item)` of each item in order, always one ahead of the one that is asked for; what it raises is raised
    where its result would have come.

    `device` is the caller's: a thread that pins memory would else do so on the node's first GPU. Close it when it is
    left early (`contextlib.closing`), so that no thread goes on unseen.
    """
    with ThreadPoolExecutor(1, "prefetch", _choose, (device,)) as pool:
        ahead: Future[Built] | None = None
        for item in items:
            following = pool.submit(build, item)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def _choose(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
