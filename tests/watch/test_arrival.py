"""Which ranks did not start: all ranks go by one list, whenever each of them asks."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist

from dpo.watch.arrival import SaidByAnother, await_start


class Late:
    """A store in which further ranks come just after a wait was in vain."""

    def __init__(self, store: dist.Store, ranks: Sequence[int]):
        self.store, self.ranks = store, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def wait(self, keys: Sequence[str], timeout: object) -> None:
        for rank in self.ranks:
            self.store.set(f"rank {rank}", "")
        raise dist.DistStoreError("wait timeout")


def outcome(store: dist.Store, rank: int, size: int, late: Sequence[int] = ()) -> str:
    try:
        await_start(Late(store, late), rank, size, 900)  # type: ignore[arg-type]
    except ConnectionError as failure:
        return f"{type(failure).__name__}: {failure}"
    return "goes on"


def test_a_rank_that_comes_between_two_looks_is_missing_to_both() -> None:
    """Rank 0 comes after rank 1 gave up: rank 1 prints the line, and rank 2 does not leave that to rank 0."""
    store = dist.HashStore()
    store.set("rank 2", "")
    line = "1 of 3 ranks did not start within 900 seconds: 0; their nodes' logs say why"
    assert outcome(store, 1, 3) == f"ConnectionError: rank 1: {line}"
    assert outcome(store, 2, 3, late=[0]) == f"{SaidByAnother.__name__}: rank 2: {line}"


@pytest.mark.parametrize("rank", [0, 1])
def test_all_that_come_in_the_last_moment_go_on(rank: int) -> None:
    """Not: 0 of 2 ranks did not start."""
    assert outcome(dist.HashStore(), rank, 2, late=[1 - rank]) == "goes on"
