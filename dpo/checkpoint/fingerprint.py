"""A hash of a model's weights that does not depend on the ranks over which they are sharded.

Each tensor has a sum over its elements, modulo 2^64: of the element with the bits b (an unsigned number) and the place
i in the whole tensor, counted from 0 in row-major order,

    s(b, i) = mix(b + (i + 1) g)        g = 9e3779b97f4a7c15, in hexadecimal
    mix(z):   z = (z ^ z >> 30) bf58476d1ce4e5b9;   z = (z ^ z >> 27) 94d049bb133111eb;   z ^ z >> 31

`mix` is that of splitmix64 (Steele, Lea and Flood, 2014): s(b, 0), s(b, 1), ... are the numbers that this generator
gives for the seed b. A sum may be split anywhere, so each rank adds up its shards, and the ranks add up their sums.
`mix` takes no two numbers to the same one, so a tensor in which a single element has changed, by one bit or by all, has
another sum for certain; where several elements have changed, the sums are equal by chance only, once in 2^64 times.

An example: an int64 tensor [1234567, 1234567] has the first two numbers of splitmix64 for the seed 1234567:

    6457827717110365317 + 3203168211198807973 = 9660995928309173290

The hash is of name, dtype, shape and sum of every tensor, 32 hex digits. It takes about as long as SHA-256.
"""

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo.distributed.shards import own_rows

_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_CHUNK = 2**15
"""Elements that are mixed at a time: their 64-bit numbers stay in a core's cache."""
_STEPS = np.arange(1, _CHUNK + 1, dtype=np.uint64) * np.uint64(_GAMMA)
"""(i + 1) g of the elements of a chunk."""
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the dtype through which its bits are read."""


def fingerprint(weights: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> str:
    """Returns the hash of all weights. Every rank must get here, or the rest hang.

    Args:
        weights: the whole model's tensors by name, the same names on every rank; of a DTensor this rank's shard, in
            host memory, is read. A plain tensor is the same on every rank.
        group: a process group of all ranks; None: the default group.
    """
    names, known = sorted(weights), dict[int, int]()
    own = []
    for name in names:
        tensor = weights[name]  # tied tensors are one
        if id(tensor) not in known:
            known[id(tensor)] = share_of_sum(tensor)
        own.append(known[id(tensor)])
    shares: list[list[int]] = [own] * dist.get_world_size(group)
    dist.all_gather_object(shares, own, group=group)
    content = hashlib.blake2b(digest_size=16)
    for name, parts in zip(names, zip(*shares, strict=True), strict=True):
        tensor = weights[name]
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)} {sum(parts) % 2**64}\n".encode())
    return content.hexdigest()


def share_of_sum(tensor: Tensor) -> int:
    """Returns this rank's share of the sum of a tensor; 0 on a rank that holds a copy of another rank's elements."""
    if not isinstance(tensor, DTensor):
        return sum_of(tensor, 0) if dist.get_rank() == 0 else 0
    meshes = zip(tensor.placements, range(tensor.device_mesh.ndim), strict=True)
    if any(placement.is_replicate() and tensor.device_mesh.get_local_rank(dim) > 0 for placement, dim in meshes):
        return 0
    return sum_of(tensor.to_local(), own_rows(tensor).start * math.prod(tensor.shape[1:]))


def sum_of(tensor: Tensor, first: int) -> int:
    """Returns the sum over the elements of a part of a tensor, an integer from 0 to 2^64 - 1.

    Args:
        tensor: successive elements of the whole tensor, in host memory.
        first: the place of the first of them.
    """
    flat = tensor.detach().contiguous().view(-1).view(_SIGNED[tensor.element_size()]).numpy()
    bits, total = flat.view(f"u{flat.itemsize}"), 0
    for begin in range(0, len(bits), _CHUNK):
        total += _sum_of_chunk(bits[begin : begin + _CHUNK], first + begin)
    return total % 2**64


def _sum_of_chunk(bits: np.ndarray, first: int) -> int:
    """Returns the sum over at most _CHUNK elements; numpy computes modulo 2^64, and lets other threads run."""
    z = bits.astype(np.uint64)
    z += _STEPS[: len(z)]
    z += np.uint64(first * _GAMMA % 2**64)
    z ^= z >> np.uint64(30)
    z *= _FIRST
    z ^= z >> np.uint64(27)
    z *= _SECOND
    z ^= z >> np.uint64(31)
    return int(z.sum())
