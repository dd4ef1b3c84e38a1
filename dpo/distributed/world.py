"""The processes of a run: their group and mesh, and what one of them decides for all."""

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo.base.errors import UserError
from dpo.config import ParallelConfig


@dataclass(frozen=True)
class World:
    """The ranks of a run; `local_*` count those of one node."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    """The store of the process group. Kept alive because rank 0 may serve it."""
    groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)
    """By their ranks, the groups of hybrid sharding's mesh: made once, though several policies are sharded over it."""

    @property
    def lane(self) -> int:
        """Returns the lane of this rank: its index into the entries of a plan, its part of the data. Each lane is one
        rank, until blocks of ranks share a row.
        """
        return self.rank

    @property
    def num_lanes(self) -> int:
        """Returns the number of lanes, which share the trees of a step."""
        return self.size

    @property
    def is_main(self) -> bool:
        """Rank 0: it alone prints, decides on files and writes metrics."""
        return self.rank == 0


def make_mesh(world: World, parallel: ParallelConfig) -> DeviceMesh:
    """The mesh that FSDP2 shards over: (shard,), or (replicate, shard) for hybrid sharding.

    Raises UserError where replicate * shard is not the number of ranks.
    """
    shard = check_mesh(world, parallel)
    device = world.device.type
    if parallel.replicate == 1:
        return init_device_mesh(device, (shard,), mesh_dim_names=("shard",))
    # `init_device_mesh` would split the group of the steps, which kills the process in torch 2.11 and 2.13 where gloo
    # is beside NCCL, and would give the parts torch's own timeout.
    ranks = torch.arange(world.size).view(parallel.replicate, shard)
    timeout = timedelta(seconds=parallel.timeout_seconds)
    mine = [_group_of(world, rows.tolist(), timeout) for rows in (ranks.T, ranks)]
    return DeviceMesh.from_group(mine, device, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _group_of(world: World, dimension: list[list[int]], timeout: timedelta) -> dist.ProcessGroup:
    """Makes the groups of a dimension of the mesh that are not there yet, and gives this rank's. Every rank must get
    here, in one order.
    """
    for ranks in map(tuple, dimension):
        if ranks not in world.groups:
            world.groups[ranks] = dist.new_group(ranks, timeout=timeout)
    return next(world.groups[tuple(ranks)] for ranks in dimension if world.rank in ranks)


def check_mesh(world: World, parallel: ParallelConfig) -> int:
    """The number of ranks that a copy is divided over. Raises UserError where copies and ranks do not fit."""
    shard = parallel.shard or max(world.size // parallel.replicate, 1)
    if parallel.replicate * shard != world.size:
        raise UserError(
            "parallel.shard",
            f"replicate {parallel.replicate} x shard {shard} is not the number of ranks {world.size}",
            f"replicate * shard = {world.size}",
        )
    return shard


# --- one decides, all follow -----------------------------------------------------------------------------------------


def use_device(device: torch.device) -> None:
    """Makes a rank's device that of this thread: one that pins memory would else do so on the node's first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
