"""The processes of a run: their group and mesh, what one of them decides for all, and how they end together."""

import atexit
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo.config import ParallelConfig, with_place
from dpo.errors import Preempted, RunError, UserError
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

    @property
    def is_main(self) -> bool:
        """Rank 0: it alone prints, decides on files and writes metrics."""
        return self.rank == 0


@contextmanager
def open_world(timeout_seconds: int) -> Iterator[World]:
    """Joins the process group that torchrun's environment describes; without torchrun a group of one.

    NCCL with a GPU a rank where there are GPUs (gloo beside it, for what lies in CPU memory), else gloo.
    """
    env = {name: int(os.environ.get(name, default)) for name, default in _ENVIRONMENT.items()}
    device = torch.device("cuda", env["LOCAL_RANK"]) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _join(timeout_seconds, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield World(env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"], device)
    dist.destroy_process_group()  # not after a failure: `run_program` still needs the group, to end all ranks together


_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def _join(timeout_seconds: int, backend: str) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    interface = gloo_interface(_ENVIRONMENT | os.environ, store)
    if interface is not None:
        os.environ[VARIABLE] = interface
    store = dist.PrefixStore("dpo", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def make_mesh(world: World, parallel: ParallelConfig) -> DeviceMesh:
    """The mesh that FSDP2 shards over: (shard,), or (replicate, shard) for hybrid sharding.

    Raises UserError where replicate * shard is not the number of ranks.
    """
    shard = check_mesh(world, parallel)
    if parallel.replicate == 1:
        return init_device_mesh(world.device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (parallel.replicate, shard), mesh_dim_names=("replicate", "shard"))


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


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Makes a RunError of what torch's distributed checkpoint raises, on all ranks alike, when a rank cannot read or
    write `folder`.
    """
    try:
        yield
    except CheckpointException as failure:
        rank, (reason, _) = next(iter(failure.failures.items()))
        room = f"{shutil.disk_usage(folder.parent).free / 2**30:.2f} GiB are free there"
        raise RunError(f"{folder}: rank {rank}: {type(reason).__name__}: {reason}; {room}") from failure


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

    Rank 0 alone prints the error, in one line; any other exception is a bug, and its traceback is shown. Why a rank
    failed stands in the file that torchrun asks for.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    set_quiet("--quiet" in sys.argv)
    untested = untested_versions()
    if untested and is_main:
        warn(untested)
    try:
        main()
    except Preempted as stop:
        _end_well({"state": "preempted", "step": stop.step}, is_main)
        if is_main:
            say(str(stop))
        _leave_together()
        return 0
    except (UserError, RunError) as failure:
        _record(failure, str(failure))
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
    except OSError as failure:  # met by this rank alone, a full disk for one: it does not wait for the others
        _record(failure, str(failure))
        print(f"error: {type(failure).__name__}: {' '.join(str(failure).split())}", file=sys.stderr, flush=True)
        return 1
    except Exception as failure:
        _record(failure, traceback.format_exc())
        raise
    _end_well({"state": "done"}, is_main)
    return 0


def _end_well(status: dict[str, Any], is_main: bool) -> None:
    """torchrun ends with 0 both when a run is done and when it was stopped: the launcher reads which."""
    if is_main:
        write_status(status)


def _record(failure: Exception, details: str) -> None:
    """Writes why and when this rank failed where torchrun, which prints `details`, and `launch/node.py` look for it.

    The form is that of torch's `torch.distributed.elastic.multiprocessing.errors.record`, which knows the time only to
    the second: too coarse to tell the rank that failed first from those that lost it.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        now = time.time()
        extra = {"py_callstack": details, "timestamp": str(int(now)), "seconds": now}
        message = {"message": f"{type(failure).__name__}: {failure}", "extraInfo": extra}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def _leave_together() -> None:
    """Lets rank 0 print before any rank ends: torchrun ends all others as soon as it sees the first."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _join(60, "gloo")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
