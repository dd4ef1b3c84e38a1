"""The file descriptors of the processes of a run: how many they need, and whether they may open as many.

A rank of 512 ranks needs up to 1,065, where Linux's usual soft limit is 1,024:

    512   the group of the steps over gloo: 511 connections and a listening socket
    512   the group of the checkpoint threads, likewise
      1   the connection to the store
     40   files of the data, the metrics and TensorBoard; pipes; event queues; 30 were counted

With parallel.replicate 64 a rank is in two groups more: of the 64 ranks with the same shard, and of the 8 ranks of its
copy. NCCL opens sockets of its own, and on the rank that starts it raises the soft limit likewise (`setFilesLimit`,
https://github.com/NVIDIA/nccl/blob/master/src/bootstrap.cc). The torchrun of the first node serves the store: it holds
a connection to each rank and to the torchrun of each other node, and of several nodes each publishes what is seen of
its ranks over one more (`dpo.watch.elsewhere`). `python -m tests.bench.many_ranks` counts them.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from dpo.base.errors import UserError
from dpo.base.limits import Limit, raise_limit
from dpo.terminal.console import say

OTHER_OF_RANK = 40
"""A rank's file descriptors that are no sockets of process groups; 30 were counted, with one file of training data."""
OTHER_OF_AGENT = 32
"""File descriptors of torchrun that are no connections of the store; 25 were counted."""


@dataclass(frozen=True)
class Descriptors:
    """The file descriptors that a process of this node needs, and its limit."""

    name: str
    """The process: `rank 3` or `torchrun`."""
    need: int
    limit: Limit


def sockets_of_rank(size: int, replicate: int) -> int:
    """Returns the sockets of a rank on CPUs: a group of n ranks takes n, and the store 1.

    Args:
        size: number of ranks.
        replicate: copies of the model; with more than one, the mesh has groups of its own.
    """
    of_mesh = replicate + size // replicate if replicate > 1 else 0
    return 2 * size + of_mesh + 1


def need_of_rank(size: int, replicate: int) -> int:
    """Returns the file descriptors that a rank needs, without those of NCCL and CUDA."""
    return sockets_of_rank(size, replicate) + OTHER_OF_RANK


def need_of_agent(size: int, nodes: int) -> int:
    """Returns the file descriptors that the torchrun of the first node needs, which serves the store."""
    publishing = nodes if nodes > 1 else 0
    return size + nodes + publishing + OTHER_OF_AGENT


def raise_limits(environment: Mapping[str, int], replicate: int) -> list[Descriptors]:
    """Raises the limit of this rank, and on rank 0 that of torchrun, to the hard limit; returns the needs and limits.

    Args:
        environment: RANK, WORLD_SIZE and LOCAL_WORLD_SIZE.
        replicate: copies of the model.
    """
    rank, size = environment["RANK"], environment["WORLD_SIZE"]
    found = [Descriptors(f"rank {rank}", need_of_rank(size, replicate), raise_limit())]
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        need = need_of_agent(size, size // environment["LOCAL_WORLD_SIZE"])
        with suppress(PermissionError):  # a process of another user
            found.append(Descriptors("torchrun", need, raise_limit(os.getppid())))
    return found


def publish_shortage(found: Sequence[Descriptors], store: dist.Store) -> None:
    """Tells all ranks, through the store, of a process whose hard limit is below its need, if there is any here."""
    for process in found:
        if process.limit.now < process.need:
            store.set(
                _KEY,
                f"{process.name} on {socket.gethostname()} may open {process.limit.now:,} files and sockets, and needs"
                f" up to {process.need:,}",
            )


_KEY = "a process that may open too few files"


def check_shortage(store: dist.Store) -> None:
    """Raises UserError, on every rank, where any process has published a shortage. All ranks must have published."""
    if store.check([_KEY]):
        raise UserError("ulimit -Hn", store.get(_KEY).decode(), _VALID)


_VALID = (
    "a higher hard limit on every node (LimitNOFILE of slurmd's service, nofile in /etc/security/limits.conf, --ulimit"
    " nofile of a container), or fewer ranks"
)


def tell_raised(found: Sequence[Descriptors]) -> None:
    """Prints a line for each process whose soft limit was below its need."""
    for process in found:
        if process.limit.before < process.need:
            say(
                f"open files: {process.name} needs up to {process.need:,}; its limit was raised from"
                f" {process.limit.before:,} to the hard limit, {process.limit.now:,}"
            )
