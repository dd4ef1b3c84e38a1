"""Copies of a sharded state in host memory: whole, its own, and in the same buffers each time."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dpo.checkpoint.host_copies import HostCopies
from dpo.config import ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from tests.support.ranks import Ranks


@pytest.fixture
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


def make_tree(world: World) -> dict[str, Any]:
    """Five rows of a sharded tensor, tied, beside a plain one, a step and settings."""
    sharded = distribute_tensor(torch.arange(15.0).view(5, 3), make_mesh(world, ParallelConfig()), [Shard(0)])
    return {
        "model": {"body": sharded, "tied head": sharded.detach()},
        "optimizer": {"state": {"body": {"step": torch.tensor(2.0)}}, "groups": [{"lr": 0.1, "params": ["body"]}]},
    }


def test_copies_are_their_own_and_their_buffers_stay(world: World) -> None:
    tree, copies = make_tree(world), HostCopies(world.device)
    first = copies.take(tree)
    tree["model"]["body"].mul_(2)
    tree["optimizer"]["state"]["body"]["step"].add_(1)
    assert torch.equal(first["model"]["body"].full_tensor(), torch.arange(15.0).view(5, 3))
    assert first["optimizer"] == {
        "state": {"body": {"step": torch.tensor(2.0)}},
        "groups": [{"lr": 0.1, "params": ["body"]}],
    }
    places = [buffer.data_ptr() for buffer in map(local, copies.buffers.values())]
    second = copies.take(tree)
    assert torch.equal(second["model"]["body"].full_tensor(), 2 * torch.arange(15.0).view(5, 3))
    assert [buffer.data_ptr() for buffer in map(local, copies.buffers.values())] == places


def test_tied_tensors_are_copied_once(world: World) -> None:
    copies = HostCopies(world.device)
    model = copies.take(make_tree(world))["model"]
    assert model["body"] is model["tied head"]
    assert bytes_of(copies) == 4 * (15 + 1)


def shares() -> tuple[int, tuple[int, ...]]:
    """Bytes of this rank's buffers, and the shape of its part."""
    with open_world(60) as world:
        copies = HostCopies(world.device)
        body = copies.take(make_tree(world))["model"]["body"]
        return bytes_of(copies), tuple(body.to_local().shape)


@pytest.mark.xdist_group("ranks")
def test_a_rank_copies_its_part(ranks: Ranks) -> None:
    """Five rows of three over two ranks are 3 and 2; over six, one of which has none. A step's 4 bytes beside them."""
    assert ranks(2, shares) == [(4 * (9 + 1), (3, 3)), (4 * (6 + 1), (2, 3))]
    assert ranks(6, shares) == [(4 * (3 + 1), (1, 3))] * 5 + [(4, (0, 3))]


def bytes_of(copies: HostCopies) -> int:
    """Of all buffers; tied ones once."""
    return sum(local(buffer).nbytes for buffer in copies.buffers.values())


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
