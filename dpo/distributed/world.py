"""The processes of a run: their group and mesh, and what one of them decides for all."""

import os
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo.base.errors import RunError, UserError
from dpo.config import ParallelConfig
from dpo.distributed.network import VARIABLE, gloo_interface

T = TypeVar("T")


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
    def is_main(self) -> bool:
        """Rank 0: it alone prints, decides on files and writes metrics."""
        return self.rank == 0


@contextmanager
def open_world(timeout_seconds: int) -> Iterator[World]:
    """Joins, over gloo, the processes that torchrun's environment describes; without torchrun a group of one.

    Phase one of two: only gloo exists and no GPU is in use, so the code that reads, tokenizes and hashes the input may
    fork. Every rank must call `start_devices` before anything is placed on `World.device`.

    Args:
        timeout_seconds: after which a collective that some rank never joined ends the run, until `start_devices`.
    """
    env = {name: int(os.environ.get(name, default)) for name, default in _ENVIRONMENT.items()}
    # Without it torch asks the CUDA runtime whether there is a GPU, which starts the driver in this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    device = torch.device("cuda", env["LOCAL_RANK"]) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        set_allocator(os.environ)
    store = join(timeout_seconds)
    yield World(env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"], device, store)
    dist.destroy_process_group()  # not after a failure: `run_program` still needs the group, to end all ranks together


def start_devices(world: World, timeout_seconds: int) -> None:
    """Replaces the group of `open_world` by that of the steps: NCCL with a GPU a rank where there are GPUs (gloo beside
    it, for what lies in CPU memory), else gloo.

    The GPUs are connected here, not at the first step, so that a network that does not work shows at once. Every rank
    must get here, or the rest hang until the timeout of `open_world`; from here on no process may fork and run on: one
    that is needed is started afresh (spawn). Raises ConnectionError, on a rank alone, where it cannot be connected.

    Args:
        timeout_seconds: after which a collective that some rank never joined ends the run, from here on.
    """
    assert world.store is not None, "only a world that open_world made has a second phase"
    on_cuda, timeout = world.device.type == "cuda", timedelta(seconds=timeout_seconds)
    store = dist.PrefixStore("steps", world.store)
    _wait_for_all(store, world.size)
    dist.destroy_process_group()
    store.set_timeout(timeout)
    try:
        if on_cuda:
            torch.cuda.set_device(world.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=world.device if on_cuda else None,
        )
        if on_cuda:
            _connect(world)
    except (dist.DistError, torch.AcceleratorError) as failure:  # of this rank, maybe alone
        raise ConnectionError(
            f"rank {world.rank}: the ranks cannot be connected: {failure}; {_ADVICE[on_cuda]}"
        ) from failure


_ADVICE = {
    True: "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose the network",
    False: f"{VARIABLE} chooses the network",
}


def _connect(world: World) -> None:
    """Runs each kind of collective of a step once. NCCL joins the ranks over sockets when it is initialized; the links
    that carry data (NVLink, InfiniBand) are set up by the first collective, and take their memory then.

    Every rank must get here, or the rest hang.
    """
    part = torch.zeros(1, device=world.device)
    whole = list(torch.zeros(world.size, device=world.device).split(1))
    dist.all_gather(whole, part)
    dist.reduce_scatter(part, whole)
    dist.all_reduce(part)
    torch.cuda.synchronize(world.device)


def _wait_for_all(store: dist.Store, size: int) -> None:
    """Waits until all ranks are here. A barrier of the group would not do before the group is destroyed: a rank that
    leaves it closes its connections, which another one may still be reading.
    """
    if store.add("arrived", 1) == size:
        store.set("all", "")
    store.wait(["all"])


def set_allocator(environment: MutableMapping[str, str]) -> None:
    """Lets torch's allocator grow its segments of device memory in place, unless the user has chosen settings: less is
    then reserved and not used. To be called before CUDA starts.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
    """
    if not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def join(timeout_seconds: int) -> dist.Store:
    """Makes the first group, over gloo, and gives the store that it was made with."""
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" not in os.environ:
        store: dist.Store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timeout)
        return store
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    interface = gloo_interface(_ENVIRONMENT | os.environ, store)
    if interface is not None:
        os.environ[VARIABLE] = interface
    store = dist.PrefixStore("dpo", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    return store


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
            f"parallel.shard: replicate {parallel.replicate} x shard {shard} is not the number of ranks"
            f" {world.size}; valid: replicate * shard = {world.size}"
        )
    return shard


# --- one decides, all follow -----------------------------------------------------------------------------------------


def together(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; if it failed on any, every rank raises the failure of the lowest one.

    Every rank must get here, or the rest hang.
    """
    result, failure = _attempt(work)
    failures = [f for f in all_gather(failure) if f is not None]
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]


def on_main(world: World, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `work` on rank 0 alone and gives its result, or its failure, to every rank, over the default group or
    another one of all ranks. Every rank must get here.
    """
    outcome: list[Any] = [_attempt(work) if world.is_main else None]
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result


def first_on_each_node(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0, then on the first rank of every other node, then on the rest: each finds in the caches of
    its node, or of all where these are shared, what those before it left.

    Every rank must get here; a failure anywhere is raised everywhere.
    """
    turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    results = [together(work if turn == now else _nothing) for now in range(3)]
    return results[turn]  # type: ignore[return-value]


def _nothing() -> None:
    """What a rank does while others work."""


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of `work`, or its failure where that is one to tell the user; other exceptions are bugs and escape."""
    try:
        return work(), None
    except (UserError, RunError) as failure:
        return None, failure
    except OSError as failure:
        return None, RunError(f"{type(failure).__name__}: {failure}")


def all_gather(value: T) -> list[T]:
    """The values of all ranks, by rank. Every rank must get here."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
