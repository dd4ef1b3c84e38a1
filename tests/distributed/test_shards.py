"""The rows that a rank holds of a sharded tensor, against `fully_shard` itself."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from dpo.config import ParallelConfig
from dpo.distributed.shards import own_rows
from dpo.distributed.startup import open_world
from dpo.distributed.world import make_mesh
from tests.support.ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")


def rows_and_values(counts: Sequence[int], replicate: int) -> list[tuple[slice, list[float]]]:
    """Of a parameter with each number of rows, whose rows have their own numbers: `own_rows`, and what is there."""
    module = nn.Module()
    for number in counts:
        module.register_parameter(f"rows{number}", nn.Parameter(torch.arange(float(number))[:, None].repeat(1, 2)))
    with open_world(60) as world:
        fully_shard(module, mesh=make_mesh(world, ParallelConfig(replicate=replicate)))
        return [(own_rows(p), p.to_local()[:, 0].tolist()) for p in module.parameters()]


def test_rows_by_hand(ranks: Ranks) -> None:
    """The example of the module: 5 rows on 3 ranks are 2, 2 and 1; 4 rows are 2, 2 and none."""
    found = ranks(3, rows_and_values, (5, 4, 1), 1)
    assert [[rows for rows, _ in of_rank] for of_rank in found] == [
        [slice(0, 2), slice(0, 2), slice(0, 1)],
        [slice(2, 4), slice(2, 4), slice(1, 1)],
        [slice(4, 5), slice(4, 4), slice(1, 1)],
    ]


@pytest.mark.parametrize(("size", "replicate"), [(1, 1), (3, 1), (4, 1), (4, 2)])
def test_rows_are_those_of_fully_shard(ranks: Ranks, size: int, replicate: int) -> None:
    """Any number of rows; each copy of the model holds all of them once."""
    counts = range(1, 12)
    found = ranks(size, rows_and_values, counts, replicate)
    for of_rank in found:
        for rows, values in of_rank:
            assert values == list(range(rows.start, rows.stop))
    for number, of_ranks in zip(counts, zip(*found, strict=True), strict=True):
        held = [value for _, values in of_ranks for value in values]
        assert sorted(held) == sorted(list(range(number)) * replicate)


def test_a_plain_tensor_is_whole() -> None:
    assert own_rows(torch.zeros(3, 2)) == slice(0, 3)
