"""The process group of a run, in two phases: gloo while the input is read, then NCCL (with gloo for CPU tensors).

Training on two ranks with a GPU each, both of which make these calls in this order:

    call                 process group                       CUDA       child processes
    open_world           store "dpo": gloo                   not used   may be forked
      read_inputs        its object collectives              not used   forked: tokenize and hash
    start_devices        waits for all ranks in the store,   starts     must be spawned from here on
                         destroys the group, and makes
                         store "steps": NCCL and gloo
      the steps          NCCL for tensors on GPUs, gloo      in use     spawned: rehearse a step
                         for tensors in CPU memory
    end of open_world    destroyed                           in use     none
"""

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from dpo.distributed.network import VARIABLE, gloo_interface
from dpo.distributed.world import World


@contextmanager
def open_world(timeout_seconds: int) -> Iterator[World]:
    """Joins the ranks that torchrun's environment describes, over gloo; without torchrun the group has one rank.

    This is phase one of two: only gloo exists and no GPU is in use, so that the code that reads, tokenizes and hashes
    the input may fork. Every rank must call `start_devices` before it places a tensor on `World.device`.

    Args:
        timeout_seconds: timeout of collectives until `start_devices`; a collective that some rank never joins then ends
            the run.
    """
    env = {name: int(os.environ.get(name, default)) for name, default in _ENVIRONMENT.items()}
    # Otherwise torch asks the CUDA runtime whether there is a GPU, which starts the driver in this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    device = torch.device("cuda", env["LOCAL_RANK"]) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        set_allocator(os.environ)
    store = join(timeout_seconds)
    yield World(env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"], device, store)
    dist.destroy_process_group()  # not after a failure: `run_program` needs the group to end all ranks together


def start_devices(world: World, timeout_seconds: int) -> None:
    """Replaces the group of `open_world` by the group of the steps: NCCL with one GPU per rank, and gloo for tensors in
    CPU memory; on CPUs gloo alone.

    The GPUs are connected here, not at the first step, so that a broken network shows at once. From here on this
    process must not fork; it must spawn child processes.

    Every rank must get here, or the rest hang until the timeout of `open_world`.

    Args:
        world: made by `open_world`.
        timeout_seconds: timeout of collectives from here on; a collective that some rank never joins then ends the run.

    Raises:
        ConnectionError: on the rank, maybe a single one, that cannot be connected.
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
    except (dist.DistError, torch.AcceleratorError) as failure:  # maybe on this rank alone
        raise ConnectionError(
            f"rank {world.rank}: the ranks cannot be connected: {failure}; {_ADVICE[on_cuda]}"
        ) from failure


_ADVICE = {
    True: "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose the network",
    False: f"{VARIABLE} chooses the network",
}


def _connect(world: World) -> None:
    """Runs each kind of collective of a step once.

    NCCL's initialization connects the ranks over sockets only. The first collective sets up the links that carry data
    (NVLink, InfiniBand) and allocates their memory.

    Every rank must get here, or the rest hang.
    """
    shard = torch.zeros(1, device=world.device)
    shards = list(torch.zeros(world.size, device=world.device).split(1))
    dist.all_gather(shards, shard)
    dist.reduce_scatter(shard, shards)
    dist.all_reduce(shard)
    torch.cuda.synchronize(world.device)


def _wait_for_all(store: dist.Store, size: int) -> None:
    """Waits, through the store, until all ranks are here, so that the group can be destroyed.

    A barrier of the group would not be safe: the first rank to leave it would close its connections while other ranks
    still read from them. Every rank must get here, or the rest hang.
    """
    if store.add("arrived", 1) == size:
        store.set("all", "")
    store.wait(["all"])


def set_allocator(environment: MutableMapping[str, str]) -> None:
    """Turns on expandable segments in torch's CUDA allocator, which then reserves less unused memory. Does nothing if
    the user has set an allocator variable. Must be called before CUDA starts.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
    """
    if not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def join(timeout_seconds: int) -> dist.Store:
    """Initializes the first process group, over gloo, and returns its store. Every rank must get here, or the rest hang
    until the timeout.
    """
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
