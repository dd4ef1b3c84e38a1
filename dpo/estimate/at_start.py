"""A run decides what its config leaves to auto, and what a step will need: once, at its start, on rank 0, for all.

Where a rehearsal is needed it runs in a process of its own: it opens a process group of ranks that are not there, which
cannot stand beside the run's own, and it must see no GPU. That process is started afresh and not forked, since a fork
of a process with a live CUDA or NCCL state may abort.
"""

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import torch
from transformers import PretrainedConfig

from dpo.base.console import say, warn
from dpo.base.errors import RunError, UserError
from dpo.config import Config
from dpo.distributed.collectives import all_gather, on_main
from dpo.distributed.world import World
from dpo.estimate.choice import Case, Choice, decide_by_bound, decide_by_rehearsal, with_values, without_estimate
from dpo.estimate.devices import Device, device_like, this_machine
from dpo.estimate.lengths import Lengths, lengths_of_pairs
from dpo.estimate.needs import with_dtype
from dpo.estimate.speed import DEFAULT_MFU, Cluster
from dpo.model.weights import read_model_config
from dpo.run.folder import Start
from dpo.run.inputs import Inputs
from dpo.run.layout import as_so_far

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


def decide_parallel(config: Config, start: Start, inputs: Inputs, world: World) -> tuple[Config, str | None]:
    """The config with no key of parallel undecided, and what a step of it needs, like `71.2 GiB`. Every rank must get
    here, or the rest hang.

    Raises UserError where the model cannot be built and something is undecided. Where the estimate fails otherwise, the
    run goes on with what needs the least memory; what that is, is then None.
    """
    config = as_so_far(config, start, world)
    memory = min(all_gather(_memory_here(world)))
    choice = on_main(world, lambda: _choice_if_possible(config, world, inputs, memory))
    if world.is_main:
        (say if choice.fits else warn)(choice.line)
    return with_values(config, choice.values), choice.needs


def _memory_here(world: World) -> float:
    """Returns the bytes that this rank may allocate: of a GPU what is free and what torch has reserved; of a CPU the
    node's memory divided by its ranks.
    """
    if world.device.type == "cpu":
        return this_machine(world.local_size).memory
    free, _ = torch.cuda.mem_get_info(world.device)
    return free + torch.cuda.memory_reserved(world.device)


def _choice_if_possible(config: Config, world: World, inputs: Inputs, memory: float) -> Choice:
    """The choice; where the estimate fails, what needs the least memory, with a line that says why."""
    try:
        return _choice(config, world, inputs, memory)
    except Exception as failure:
        if isinstance(failure, UserError) and config.parallel.undecided:
            raise
        is_line = isinstance(failure, (UserError, RunError))
        return without_estimate(config.parallel.undecided, str(failure) if is_line else _named(failure))


def _choice(config: Config, world: World, inputs: Inputs, memory: float) -> Choice:
    lengths = lengths_of_pairs(config, inputs.data.train, inputs.order, inputs.last_step)
    return choice_here(config, (inputs.model.folder, inputs.model.config), lengths, world, memory)


def choice_here(
    config: Config, model: tuple[Path, PretrainedConfig], lengths: Lengths, world: World, memory: float
) -> Choice:
    """The choice on this rank's kind of device with so many bytes, for a model by its folder or hub id and its config.

    Raises UserError where the model cannot be built, anything else where the estimate fails otherwise.
    """
    device = _device_here(world, memory)
    config = with_dtype(config, device)
    cluster = Cluster(device, world.size, world.local_size, DEFAULT_MFU)
    found = decide_by_bound(Case(config, model[1], lengths, cluster))
    if found is not None:
        return found
    say("estimate: rehearsing a step")
    return in_own_process(_rehearse, config, model[0], lengths, cluster)


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


def in_own_process(work: Callable[[*Arguments], Result], *args: *Arguments) -> Result:
    """The result of `work`, importable by name, in a process that is started for it; its UserError is raised here, and
    RunError, with a line that names it, for any other failure.
    """
    ours, theirs = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_serve, args=(theirs, work, args), daemon=True)
    process.start()
    theirs.close()
    try:
        outcome: tuple[Result, BaseException | None] = ours.recv()
        process.join()
    except EOFError:
        process.join()
        failed = RunError(f"its process ended without a result, with exit code {process.exitcode}")
        raise failed from None
    result, failure = outcome
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
        pipe.send((None, RunError(_named(failure))))


def _named(failure: Exception) -> str:
    """A failure in one line, with the place that raised it."""
    frame = traceback.extract_tb(failure.__traceback__)[-1]
    place = f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} in {frame.name}"
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]} ({place})"
