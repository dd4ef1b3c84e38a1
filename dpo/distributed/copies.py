"""Fills the tensors of several copies of a model while one copy alone reads them.

With parallel.replicate 2 on four ranks, of a tensor of four rows:

    rank    copy    shard       filled
    0       0       rows 0, 1   from the files
    1       0       rows 2, 3   from the files
    2       1       rows 0, 1   by a broadcast from rank 0
    3       1       rows 2, 3   by a broadcast from rank 1

A model or checkpoint of 64 nodes with a copy on each would otherwise be read 64 times from the file server.
"""

from collections.abc import Callable, Collection

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo.distributed.collectives import together
from dpo.distributed.shards import local


def fill_copies(tensors: Collection[Tensor], read: Callable[[dist.ProcessGroup | None], None]) -> None:
    """Fills tensors by `read` on the ranks of the first copy, then broadcasts each shard to the ranks of the other
    copies; where there is one copy, all ranks read.

    Every rank must get here with the same tensors in the same order, or the rest hang.

    Args:
        tensors: DTensors on the mesh of `make_mesh`, and plain tensors, which are the same on every rank.
        read: fills the tensors of the ranks of a group, all of which call it; None: of all ranks.

    Raises:
        RunError: on every rank, where `read` raises it on any.
    """
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    assert len(meshes) <= 1, meshes
    mesh = next(iter(meshes), None)
    if mesh is None or mesh.ndim == 1:
        return read(None)
    is_first = mesh.get_local_rank("replicate") == 0
    together(lambda: read(mesh.get_group("shard")) if is_first else None)
    across = mesh.get_group("replicate")
    for tensor in tensors:
        shard = local(tensor)
        if shard.numel():  # the last ranks may have no rows of a small tensor
            dist.broadcast(shard, dist.get_global_rank(across, 0), group=across)
