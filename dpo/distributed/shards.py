"""The rows of a sharded tensor that this rank holds, as `fully_shard` lays them out: torch.chunk of its rows.

Of a tensor of 5 rows on 3 ranks, rank 0 holds rows 0 and 1, rank 1 rows 2 and 3, rank 2 row 4; of one of 4 rows on 3
ranks, rank 2 holds none. With several copies of a model (HSDP) each copy is laid out so.
"""

import math

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """Returns the rows of a tensor that this rank holds; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns a whole tensor, gathered from all ranks, every one of which must get here; a plain tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> slice:
    """Returns the rows of the whole tensor that this rank holds; all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[0])
    rows = slice(0, tensor.shape[0])
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        assert isinstance(placement, Shard) and placement.dim == 0 and rows.start == 0, tensor.placements
        rank, size = tensor.device_mesh.get_local_rank(dim), tensor.device_mesh.size(dim)
        num_rows = math.ceil(tensor.shape[0] / size)
        begin = min(rank * num_rows, tensor.shape[0])
        rows = slice(begin, min(begin + num_rows, tensor.shape[0]))
    assert len(local(tensor)) == rows.stop - rows.start, (tensor.shape, tensor.placements, rows)
    return rows
