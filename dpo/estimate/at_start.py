"""A run decides what its config leaves to auto: once, at its start, on rank 0, for all ranks.

Where a rehearsal is needed it runs in a process of its own: it opens a process group of ranks that are not there, which
cannot stand beside the run's own, and it must see no GPU. That process is started afresh and not forked, since a fork
of a process with a live CUDA or NCCL state may abort.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dpo.config import Config
from dpo.distributed import World, all_gather, on_main
from dpo.errors import RunError, UserError
from dpo.estimate.choice import Case, Choice, decide_by_bound, decide_by_rehearsal, with_values
from dpo.estimate.devices import Device, device_like, this_machine
from dpo.estimate.lengths import Lengths, lengths_of_pairs
from dpo.estimate.needs import with_dtype
from dpo.estimate.speed import DEFAULT_MFU, Cluster
from dpo.inputs import Inputs
from dpo.progress import say, warn
from dpo.weights import read_model_config


def decide_parallel(config: Config, world: World, inputs: Inputs) -> Config:
    """The config with no key of parallel undecided. Every rank must get here, or the rest hang.

    Raises UserError where the model cannot be built, RunError where the process that rehearses is lost.
    """
    if not config.parallel.undecided:
        return config
    memory = min(all_gather(_memory_here(world)))
    choice = on_main(world, lambda: _choice(config, world, inputs, memory))
    if world.is_main:
        (say if choice.fits else warn)(choice.line)
    return with_values(config, choice.values)


def _memory_here(world: World) -> float:
    """Bytes of this rank's device that its tensors may take: not what other processes hold, nor this one's context."""
    if world.device.type == "cpu":
        return this_machine(world.local_size).memory
    free, _ = torch.cuda.mem_get_info(world.device)
    return free + torch.cuda.memory_reserved(world.device)


def _choice(config: Config, world: World, inputs: Inputs, memory: float) -> Choice:
    device = _device_here(world, memory)
    config = with_dtype(config, device)
    cluster = Cluster(device, world.size, world.local_size, DEFAULT_MFU)
    lengths = lengths_of_pairs(config, inputs.data.train, inputs.order, inputs.last_step)
    found = decide_by_bound(Case(config, inputs.model.config, lengths, cluster))
    if found is not None:
        return found
    say("parallel (auto): rehearsing a step")
    return in_own_process(_rehearse, config, inputs.model.folder, lengths, cluster)


def _device_here(world: World, memory: float) -> Device:
    if world.device.type == "cpu":
        return replace(this_machine(world.local_size), memory=memory)
    found = torch.cuda.get_device_properties(world.device)
    device, is_known = device_like(found.name, found.total_memory, (found.major, found.minor))
    if not is_known:
        what = f"{found.name} (compute capability {found.major}.{found.minor}) is not in the estimate's table"
        say(f"parallel (auto): {what}; its speeds are taken for those of {device.name}")
    return replace(device, memory=memory)


# --- in a process of its own -----------------------------------------------------------------------------------------


def _rehearse(config: Config, folder: Path, lengths: Lengths, cluster: Cluster) -> Choice:
    """The model's config is read again: its class may be code that came with the model, which cannot be sent."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    model_config = read_model_config(folder, config.model.trust_remote_code)
    return decide_by_rehearsal(Case(config, model_config, lengths, cluster))


def in_own_process(work: Callable[..., Any], *args: Any) -> Any:
    """The result of `work`, importable by name, in a process that is started for it; its UserError is raised here."""
    ours, theirs = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_serve, args=(theirs, work, args), daemon=True)
    process.start()
    theirs.close()
    try:
        result, failure = ours.recv()
    except EOFError:
        result, failure = None, RunError(_lost("ended without a result"))
    process.join()
    if failure is not None:
        raise failure
    return result


def _serve(pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Sends (result, None) or (None, failure). What ends a run or asks it to stop ends not this process, but its
    parent.
    """
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        pipe.send((work(*args), None))
    except UserError as failure:
        pipe.send((None, failure))
    except Exception as failure:
        pipe.send((None, RunError(_lost(f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"))))


def _lost(what: str) -> str:
    return (
        f"the process that estimates the memory of a step: {what}; it is not needed where"
        " parallel.activation_checkpointing and parallel.sync_gradients are not auto"
    )
