"""Decides the keys that a config leaves to `auto`, and estimates the memory of a step: once per start, on rank 0, for
all.

A rehearsal runs in a process of its own. It opens a fake process group, which cannot exist beside the run's group, and
it must see no GPU. The process is spawned and not forked, because a fork of a process with live CUDA or NCCL state may
abort.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from dpo.base.errors import RunError, UserError
from dpo.base.spawned import described, in_own_process
from dpo.config import Config
from dpo.distributed.collectives import all_gather, on_main
from dpo.distributed.world import World
from dpo.estimate.choice import Case, Choice, decide_by_bound, decide_by_rehearsal, with_values, without_estimate
from dpo.estimate.devices import Device, device_like, this_machine
from dpo.estimate.lengths import Lengths, lengths_of_pairs
from dpo.estimate.needs import with_dtype
from dpo.estimate.speed import Cluster
from dpo.machine.data_sheets import DEFAULT_MFU
from dpo.model.model_config import read_model_config
from dpo.run.folder import Start
from dpo.run.inputs import Inputs
from dpo.run.layout import with_earlier_choice
from dpo.terminal.console import say, warn


def decide_parallel(config: Config, start: Start, inputs: Inputs, world: World) -> tuple[Config, str | None]:
    """Returns the config with every key of `parallel` decided, and the memory that a step of it needs. Every rank must
    get here, or the rest hang.

    Where the estimate fails, the values that need the least memory are taken and the memory is None.

    Args:
        config: the run's, in which keys of `parallel` may be auto.
        start: the start of the run, for the values of an earlier start.
        inputs: the data and the model.
        world: the ranks, after `start_devices`.

    Returns:
        The config, and the bytes that must fit into a rank's memory as text, like `71.2 GiB`, or None.

    Raises:
        UserError: the model cannot be built, and a key is undecided.
    """
    config = with_earlier_choice(config, start, world)
    memory = min(all_gather(_memory_here(world)))
    choice = on_main(world, lambda: _choice_if_possible(config, world, inputs, memory))
    if world.is_main:
        (say if choice.fits else warn)(choice.line)
    return with_values(config, choice.values), choice.needs


def _memory_here(world: World) -> float:
    """Returns the bytes that this rank may allocate: of a GPU the free bytes and the bytes that torch has reserved; of
    a CPU the node's memory divided by its ranks.
    """
    if world.device.type == "cpu":
        return this_machine(world.local_size).memory
    free, _ = torch.cuda.mem_get_info(world.device)
    return free + torch.cuda.memory_reserved(world.device)


def _choice_if_possible(config: Config, world: World, inputs: Inputs, memory: float) -> Choice:
    """Returns the choice; where the estimate fails, the values that need the least memory, with a line that gives the
    reason.
    """
    try:
        return _choice(config, world, inputs, memory)
    except Exception as failure:
        if isinstance(failure, UserError) and config.parallel.undecided:
            raise
        is_line = isinstance(failure, (UserError, RunError))
        return without_estimate(config.parallel.undecided, str(failure) if is_line else described(failure))


def _choice(config: Config, world: World, inputs: Inputs, memory: float) -> Choice:
    lengths = lengths_of_pairs(config, inputs.data.train, inputs.order, inputs.last_step)
    return choice_here(config, (inputs.model.folder, inputs.model.config), lengths, world, memory)


def choice_here(
    config: Config, model: tuple[Path, PretrainedConfig], lengths: Lengths, world: World, memory: float
) -> Choice:
    """Returns the choice for a model on this rank's kind of device.

    Args:
        config: the config, with keys of `parallel` on auto.
        model: the model's folder or hub id, and its config.
        lengths: the trees of some steps.
        world: this rank.
        memory: bytes that every device has.

    Raises:
        UserError: the model cannot be built. Any other exception means that the estimate failed.
    """
    device = _device_here(world, memory)
    config = with_dtype(config, device)
    cluster = Cluster(device, world.size, world.local_size, DEFAULT_MFU)
    choice = decide_by_bound(Case(config, model[1], lengths, cluster))
    if choice is not None:
        return choice
    say("estimate: rehearsing a step")
    return in_own_process(_rehearse, config, model[0], lengths, cluster)


def _device_here(world: World, memory: float) -> Device:
    if world.device.type == "cpu":
        return replace(this_machine(world.local_size), memory=memory)
    gpu = torch.cuda.get_device_properties(world.device)
    device, is_known = device_like(gpu.name, gpu.total_memory, (gpu.major, gpu.minor))
    if not is_known:
        unknown = f"{gpu.name} (compute capability {gpu.major}.{gpu.minor}) is not in the estimate's table"
        say(f"parallel (auto): {unknown}; the speeds of {device.name} are assumed")
    return replace(device, memory=memory)


# --- in a process of its own -----------------------------------------------------------------------------------------


def _rehearse(config: Config, folder: Path, lengths: Lengths, cluster: Cluster) -> Choice:
    """Reads the model's config again and decides by rehearsal. The config's class may be code that came with the model,
    which cannot be sent to another process.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    model_config = read_model_config(folder, config.model.trust_remote_code)
    return decide_by_rehearsal(Case(config, model_config, lengths, cluster))
