"""The processes of a run: their group and mesh, what one of them decides for all, and how they end together."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo.config import ParallelConfig, with_place
from dpo.errors import Preempted, RunError, UserError
from dpo.failures import met_alone, record_failure
from dpo.network import VARIABLE, gloo_interface
from dpo.progress import say, set_quiet, warn
from dpo.run_files import write_status
from dpo.versions import untested_versions
from dpo.visible import harmless

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
    """Of `open_world`: kept, since rank 0 may be the server of the others'."""

    @property
    def is_main(self) -> bool:
        """Rank 0: it alone prints, decides on files and writes metrics."""
        return self.rank == 0


@contextmanager
def open_world(timeout_seconds: int) -> Iterator[World]:
    """Joins, over gloo, the processes that torchrun's environment describes; without torchrun a group of one.

    It is the first of two phases: NCCL does not exist and nothing lies on a GPU, so that what reads, tokenizes and
    hashes the input may fork. Before anything is placed on `World.device` every rank must call `start_devices`.

    Args:
        timeout_seconds: after which a collective that some rank never joined ends the run, until `start_devices`.
    """
    env = {name: int(os.environ.get(name, default)) for name, default in _ENVIRONMENT.items()}
    # Without it torch asks the CUDA runtime whether there is a GPU, which starts the driver in this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    device = torch.device("cuda", env["LOCAL_RANK"]) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        set_allocator(os.environ)
    store = _join(timeout_seconds)
    yield World(env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"], device, store)
    dist.destroy_process_group()  # not after a failure: `run_program` still needs the group, to end all ranks together


def start_devices(world: World, timeout_seconds: int) -> None:
    """Replaces the group of `open_world` by that of the steps: NCCL with a GPU a rank where there are GPUs (gloo beside
    it, for what lies in CPU memory), else gloo.

    NCCL connects the ranks here, not at the first step, so that a network that does not work shows at once. Every rank
    must get here, or the rest hang until the timeout of `open_world`; from here on no process may fork. Raises
    ConnectionError, on a rank alone, where it cannot be connected.

    Args:
        timeout_seconds: after which a collective that some rank never joined ends the run, from here on.
    """
    assert world.store is not None, "only a world that open_world made has a second phase"
    on_cuda, timeout = world.device.type == "cuda", timedelta(seconds=timeout_seconds)
    store = dist.PrefixStore("steps", world.store)
    _wait_for_all(store, world.size)
    dist.destroy_process_group()
    store.set_timeout(timeout)
    if on_cuda:
        torch.cuda.set_device(world.device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=world.device if on_cuda else None,
        )
    except dist.DistError as failure:  # of this rank, maybe alone
        advice = "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose the network"
        raise ConnectionError(f"rank {world.rank}: the GPUs cannot be connected: {failure}; {advice}") from failure


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


def _join(timeout_seconds: int) -> dist.Store:
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
    # `init_device_mesh` would split the group of the steps, which kills the process in torch 2.13 where gloo is beside
    # NCCL, and would give the parts torch's own timeout.
    ranks = torch.arange(world.size).view(parallel.replicate, shard)
    timeout = timedelta(seconds=parallel.timeout_seconds)
    mine = [_group_of(world.rank, rows.tolist(), timeout) for rows in (ranks.T, ranks)]
    return DeviceMesh.from_group(mine, device, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _group_of(rank: int, groups: list[list[int]], timeout: timedelta) -> dist.ProcessGroup:
    """Makes all groups of a dimension of the mesh, and gives this rank's. Every rank must get here, in one order."""
    made = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in groups]
    return next(group for ranks, group in made if rank in ranks)


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


# --- how a program ends ----------------------------------------------------------------------------------------------


def exit_program(main: Callable[[], None]) -> NoReturn:
    """Ends this process with the exit code of `run_program`, past the interpreter's own way down.

    Seen twice in some sixty runs of two ranks on gloo: a thread of torch's that still runs while Python takes the
    process down aborts it ("terminate called without an active exception"), and what is done looks like a crash.
    """
    code = run_program(main)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # who read it has gone
            stream.flush()
    os._exit(code)


def run_program(main: Callable[[], None]) -> int:
    """The exit code of a program: 0 done (also where it was asked to stop, and saved), 2 the user's input is wrong,
    1 something found while running, 130 Ctrl-C.

    Rank 0 alone prints the error, in one line, but for what one rank meets alone (see `met_alone`): that rank prints it
    and ends at once, so that torchrun ends the others, which may wait for it in a collective. Any other exception is a
    bug, and its traceback is shown. Why a rank failed stands in the file that torchrun asks for.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    set_quiet("--quiet" in sys.argv)
    untested = untested_versions()
    if untested and is_main:
        warn(untested)
    try:
        main()
    except Preempted as stop:
        if is_main:  # torchrun ends with 0 both when a run is done and when it was stopped: the launcher reads which
            write_status({"state": "preempted", "step": stop.step})
            say(str(stop))
        _leave_together()
        return 0
    except (UserError, RunError) as failure:
        record_failure(failure, str(failure))
        if is_main:
            message = harmless(" ".join(str(failure).split()))
            print(f"error: {with_place(message, sys.argv[1:])}", file=sys.stderr, flush=True)
        _leave_together()
        return 2 if isinstance(failure, UserError) else 1
    except KeyboardInterrupt:
        if is_main:
            what = "the same command goes on from the newest checkpoint, or starts again where there is none yet"
            print(f"stopped; {what}", file=sys.stderr, flush=True)
        return 130
    except Exception as failure:
        line = met_alone(failure)
        record_failure(failure, line or traceback.format_exc())
        if line is None:
            raise
        print(f"error: {harmless(line)}", file=sys.stderr, flush=True)  # it does not wait for the others
        return 1
    if is_main:
        write_status({"state": "done"})
    return 0


def _leave_together() -> None:
    """Lets rank 0 print before any rank ends: torchrun ends all others as soon as it sees the first."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _join(60)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
