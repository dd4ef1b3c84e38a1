"""The ranks and lanes of a run, and the mesh over which FSDP2 shards the model."""

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo.base.errors import UserError
from dpo.config import ParallelConfig
from dpo.watch.flight import Flight


@dataclass(frozen=True)
class World:
    """The rank of this process among the ranks of a run. `local_rank` and `local_size` count the ranks of this node."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    """The store of the process group. Referenced here to keep it alive, since rank 0 may serve it."""
    flight: Flight | None = field(default=None, repr=False, compare=False)
    """Where NCCL writes the last collectives of this node's ranks; None: there is one rank, which waits for none."""
    groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)
    """Ranks -> their group in the mesh of hybrid sharding. Made once, also if several policies are sharded."""

    @property
    def lane(self) -> int:
        """Returns the lane of this rank: the index of its part of the data in a plan. Each lane is one rank, until
        blocks of ranks share a row.
        """
        return self.rank

    @property
    def num_lanes(self) -> int:
        """Returns the number of lanes over which the trees of a step are divided."""
        return self.size

    @property
    def is_main(self) -> bool:
        """Returns whether this is rank 0, which alone prints, decides on files and writes metrics."""
        return self.rank == 0


def make_mesh(world: World, parallel: ParallelConfig) -> DeviceMesh:
    """Makes the mesh over which FSDP2 shards: (shard,), or (replicate, shard) for hybrid sharding.

    Raises UserError if replicate * shard is not the number of ranks. Every rank must get here, or the rest hang.
    """
    shard = check_mesh(world, parallel)
    device = world.device.type
    if parallel.replicate == 1:
        return init_device_mesh(device, (shard,), mesh_dim_names=("shard",))
    # Not by `init_device_mesh`: it splits the group of the steps, which kills the process in torch 2.11 and 2.13 if the
    # group has gloo beside NCCL, and its groups would have torch's default timeout.
    ranks = torch.arange(world.size).view(parallel.replicate, shard)
    timeout = timedelta(seconds=parallel.timeout_seconds)
    groups = [_group_of(world, dimension.tolist(), timeout) for dimension in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _group_of(world: World, dimension: list[list[int]], timeout: timedelta) -> dist.ProcessGroup:
    """Makes the missing groups of one dimension of the mesh, and returns the group of this rank.

    Every rank must get here with the dimensions in the same order, or the rest hang.
    """
    for ranks in map(tuple, dimension):
        if ranks not in world.groups:
            world.groups[ranks] = dist.new_group(ranks, timeout=timeout)
    return next(world.groups[tuple(ranks)] for ranks in dimension if world.rank in ranks)


def check_mesh(world: World, parallel: ParallelConfig) -> int:
    """Returns the number of ranks over which a copy of the model is sharded. Raises UserError if replicate * shard is
    not the number of ranks.
    """
    if parallel.shard is None and world.size % parallel.replicate != 0:
        divisors = [number for number in range(1, world.size + 1) if world.size % number == 0]
        what = f"{parallel.replicate} replicas do not divide {world.size} ranks evenly"
        raise UserError("parallel.replicate", what, ", ".join(map(str, divisors)))
    shard = parallel.shard or world.size // parallel.replicate
    if parallel.replicate * shard != world.size:
        raise UserError(
            "parallel.shard",
            f"replicate {parallel.replicate} x shard {shard} is not the number of ranks {world.size}",
            f"replicate * shard = {world.size}",
        )
    return shard


def use_device(device: torch.device) -> None:
    """Sets the current CUDA device of this thread to the rank's GPU. A thread that pins memory would otherwise use the
    first GPU of the node.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
