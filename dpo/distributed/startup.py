"""The process group of a run, in two phases: gloo while the input is read, then NCCL (with gloo for CPU tensors).

Training on two ranks with a GPU each, both of which make these calls in this order:

    call                 process group                       CUDA       child processes
    open_world           waits for all ranks in the store,   not used   may be forked
                         and makes store "dpo": gloo
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

from dpo.base.workers import end_with
from dpo.command.rank import is_rank
from dpo.distributed.descriptors import check_shortage, publish_shortage, raise_limits, tell_raised
from dpo.distributed.network import VARIABLE, gloo_interface
from dpo.distributed.timeouts import arrival_seconds
from dpo.distributed.world import World
from dpo.machine.job import check_tasks
from dpo.watch.arrival import ALL_HERE, arrive, await_start
from dpo.watch.beats import beating, set_limit
from dpo.watch.failures import NotConnected
from dpo.watch.flight import Flight


@contextmanager
def open_world(timeout_seconds: int, replicate: int = 1) -> Iterator[World]:
    """Joins the ranks that torchrun's environment describes, over gloo; without torchrun the group has one rank.

    This is phase one of two: only gloo exists and no GPU is in use, so that the code that reads, tokenizes and hashes
    the input may fork. Every rank must call `start_devices` before it places a tensor on `World.device`.

    Args:
        timeout_seconds: timeout of collectives until `start_devices`; a collective that some rank never joins then ends
            the run.
        replicate: copies of the model, for the number of file descriptors that a rank will need.

    Raises:
        UserError: on every rank, where any rank may open too few file descriptors; and where srun started tasks that
            are not ranks of one run.
    """
    check_tasks(os.environ)
    _end_with_torchrun()
    env = _environment()
    # Otherwise torch asks the CUDA runtime whether there is a GPU, which starts the driver in this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    device = torch.device("cuda", env["LOCAL_RANK"]) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        set_allocator(os.environ)
    store = join(timeout_seconds, replicate)
    with beating(env, store, timeout_seconds) as slots:
        flight = Flight(slots) if slots else None
        yield World(env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"], device, store, flight)
        dist.destroy_process_group()  # not after a failure: `run_program` needs the group to end all ranks together


def _end_with_torchrun() -> None:
    """Has the kernel kill this rank when the torchrun that started it is killed: the ranks would train on, unseen, with
    the GPUs and the run folder.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())


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
        NotConnected: on the rank, maybe a single one, that cannot be connected.
    """
    assert world.store is not None, "only a world that open_world made has a second phase"
    on_cuda, timeout = world.device.type == "cuda", timedelta(seconds=timeout_seconds)
    store = dist.PrefixStore("steps", world.store)
    # Not a barrier of the group: the first rank to leave it would close its connections while others read from them.
    arrive(store, world.size)
    store.wait([ALL_HERE])
    dist.destroy_process_group()
    store.set_timeout(timeout)
    set_limit(timeout_seconds)
    if on_cuda and world.flight is not None:
        world.flight.turn_on(os.environ)
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
        raise NotConnected(
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


def set_allocator(environment: MutableMapping[str, str]) -> None:
    """Turns on expandable segments in torch's CUDA allocator, which then reserves less unused memory. Does nothing if
    the user has set an allocator variable. Must be called before CUDA starts.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
    """
    if not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def join(timeout_seconds: int, replicate: int = 1) -> dist.Store:
    """Initializes the first process group, over gloo, and returns its store. Every rank must get here, or the rest hang
    until the timeout.

    Args:
        timeout_seconds: timeout of the collectives of the group.
        replicate: copies of the model, for the number of file descriptors that this rank will need.

    Raises:
        UserError: on every rank, where any rank may open too few file descriptors.
        ConnectionError: on the ranks that are here, where others are not after `arrival_seconds`.
    """
    timeout = timedelta(seconds=timeout_seconds)
    found = raise_limits(_environment(), replicate)
    if not is_rank(os.environ):
        store: dist.Store = dist.HashStore()
        publish_shortage(found, store)
        check_shortage(store)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timeout)
        return store
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    interface = gloo_interface(_ENVIRONMENT | os.environ, store)
    if interface is not None:
        os.environ[VARIABLE] = interface
    store = dist.PrefixStore("dpo", store)
    publish_shortage(found, store)
    await_start(dist.PrefixStore("start", store), rank, size, min(timeout_seconds, arrival_seconds(size)))
    check_shortage(store)
    if rank == 0:
        tell_raised(found)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    return store


def meet(name: str, timeout: timedelta) -> None:
    """Waits in torchrun's store until all ranks are here, without a process group; raises DistError after `timeout`.

    Args:
        name: of this meeting of the ranks.
        timeout: for connecting to the store, and for waiting.
    """
    store, _, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(name, store)
    arrive(store, size)
    store.wait([ALL_HERE], timeout)


def _environment() -> dict[str, int]:
    """Returns the numbers of torchrun's environment, by name; without torchrun those of a single rank."""
    return {name: int(os.environ.get(name, default)) for name, default in _ENVIRONMENT.items()}
