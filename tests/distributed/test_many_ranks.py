"""What a run of many ranks needs and waits for, by numbers worked out by hand."""

import resource
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from dpo.base.errors import UserError
from dpo.base.limits import Limit, raise_limit
from dpo.distributed.descriptors import (
    Descriptors,
    check_shortage,
    need_of_agent,
    need_of_rank,
    publish_shortage,
    sockets_of_rank,
)
from dpo.distributed.timeouts import arrival_seconds, leave_seconds


@pytest.fixture(autouse=True)
def _own_limit() -> Iterator[None]:
    """The soft limit as it was."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("size", "replicate", "sockets"),
    [
        (1, 1, 3),  # two listening sockets and the store
        (2, 1, 5),
        (512, 1, 1025),  # 2 x (511 connections and a listening socket), and the store
        (512, 64, 1097),  # and a group of 64 ranks and one of 8: 63 + 1 and 7 + 1
        (4, 4, 14),  # groups of 4 ranks, 4, 4 and 1, and the store
    ],
)
def test_sockets_of_a_rank(size: int, replicate: int, sockets: int) -> None:
    assert sockets_of_rank(size, replicate) == sockets
    assert need_of_rank(size, replicate) == sockets + 40


def test_the_first_torchrun_holds_a_connection_to_each_rank_and_node() -> None:
    """And to one rank of each of several nodes once more, which publishes."""
    assert need_of_agent(512, 64) == 512 + 64 + 64 + 32
    assert need_of_agent(8, 1) == 8 + 1 + 32


@pytest.mark.parametrize(("size", "arrival", "leave"), [(1, 901, 61), (8, 908, 68), (512, 1412, 572)])
def test_waits_grow_by_a_second_per_rank(size: int, arrival: int, leave: int) -> None:
    assert (arrival_seconds(size), leave_seconds(size)) == (arrival, leave)


def test_the_soft_limit_is_raised_to_the_hard_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
    assert raise_limit() == Limit(before=hard - 1, now=hard)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_a_shortage_is_an_error_that_names_need_and_limit() -> None:
    store = dist.HashStore()
    publish_shortage([Descriptors("rank 3", 100, Limit(64, 100))], store)
    check_shortage(store)
    publish_shortage([Descriptors("rank 3", 101, Limit(64, 100))], store)
    with pytest.raises(UserError, match=r"^ulimit -Hn: rank 3 on .* may open 100 files .* needs up to 101; valid: "):
        check_shortage(store)
