"""The hash of sharded weights: published numbers, every single bit, every layout."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dpo.checkpoint.fingerprint import _CHUNK, fingerprint, sum_of
from dpo.distributed.startup import open_world
from tests.support.ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")

SPLITMIX64 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
"""The first numbers of splitmix64 for the seed 1234567, as published for tests of the generator."""


def test_the_numbers_are_those_of_splitmix64() -> None:
    for place, number in enumerate(SPLITMIX64):
        assert sum_of(torch.tensor([1234567]), place) == number
    assert sum_of(torch.full((5,), 1234567), 0) == sum(SPLITMIX64) % 2**64


def plain_sum(bits: list[int], first: int) -> int:
    """The formula in Python's integers."""
    total = 0
    for place, number in enumerate(bits, start=first):
        z = (number + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        total += z ^ z >> 31
    return total % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8])
def test_bits_are_read_as_unsigned_numbers(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5) * 40).to(dtype)
    width = f"<u{tensor.element_size()}"
    bits = np.frombuffer(tensor.view(torch.uint8).numpy().tobytes(), width).tolist()
    assert sum_of(tensor, 7) == plain_sum(bits, 7)


@pytest.mark.parametrize("cut", [0, 1, _CHUNK - 1, _CHUNK, _CHUNK + 1, 2 * _CHUNK + 5])
def test_a_sum_may_be_split_anywhere(cut: int) -> None:
    whole = torch.randn(2 * _CHUNK + 5)
    assert (sum_of(whole[:cut], 0) + sum_of(whole[cut:], cut)) % 2**64 == sum_of(whole, 0)


def alone(weights: dict[str, torch.Tensor]) -> str:
    with open_world(60):
        return fingerprint(weights)


def test_every_single_bit_counts() -> None:
    """Each of 32 bits of each of 12 elements, in the sign of a zero too; all the sums differ from each other."""
    weight = torch.randn(3, 4)
    weight[1, 2] = 0.0
    sums = {sum_of(weight, 0)}
    for place in range(12):
        for bit in range(32):
            flipped = weight.clone()
            flat = flipped.view(-1).view(torch.int32)
            flat[place] ^= -(2**31) if bit == 31 else 2**bit
            sums.add(sum_of(flipped, 0))
    assert len(sums) == 1 + 12 * 32


def test_names_places_shapes_and_dtypes_count() -> None:
    weight = torch.randn(3, 4)
    swapped = weight.clone()
    swapped[0], swapped[1] = weight[1], weight[0]
    kinds: list[dict[str, torch.Tensor]] = [
        {"a": weight},
        {"b": weight},
        {"a": swapped},
        {"a": weight.reshape(4, 3)},
        {"a": weight.view(torch.int32)},
        {"a": weight, "b": weight},
        {},
    ]
    assert len({alone(weights) for weights in kinds}) == len(kinds)
    assert alone({"a": weight, "b": swapped}) == alone({"b": swapped, "a": weight})


def tensors() -> dict[str, torch.Tensor]:
    """Tensors of which some ranks have no rows, and one in two chunks."""
    made = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"one": (1, 3), "few": (2,), "odd": (7, 5), "long": (5, _CHUNK), "bias": (4,)}
    found = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    return found | {"half": torch.randn(6, 3, generator=made).bfloat16()}


def sharded(replicate: int) -> str:
    """The hash on a mesh of (replicate, shard); the last tensor is plain."""
    with open_world(60):
        size = dist.get_world_size()
        if replicate == 1:
            mesh, places = init_device_mesh("cpu", (size,)), [Shard(0)]
        else:
            mesh, places = init_device_mesh("cpu", (replicate, size // replicate)), [Replicate(), Shard(0)]
        weights: dict[str, Any] = {name: distribute_tensor(each, mesh, places) for name, each in tensors().items()}
        assert all(isinstance(each, DTensor) for each in weights.values())
        return fingerprint(weights | {"bias": tensors()["bias"]})


@pytest.mark.parametrize(("size", "replicate"), [(1, 1), (2, 1), (3, 1), (4, 2), (2, 2)])
def test_the_layout_does_not_count(ranks: Ranks, size: int, replicate: int) -> None:
    """The same on every rank, and as of the whole tensors in one process."""
    assert set(ranks(size, sharded, replicate)) == {alone(tensors())}
