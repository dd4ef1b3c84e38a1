"""What the config's model takes: of the memory of every rank, before any activation, and of the disk."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from dpo.config import Config
from dpo.distributed import World
from dpo.doctor.parts import Finding, Part, Sizes, Subject
from dpo.doctor.words import gib
from dpo.estimate.memory import state_numbers
from dpo.estimate.words import shown_count
from dpo.failures import estimate_command
from dpo.machine import host_memory
from dpo.policy import build_on_meta


def sizes_of(config: Config, model_config: PretrainedConfig) -> Sizes:
    """The sizes of a run of this model. Raises UserError where the model cannot be trained."""
    dtype, export_dtype = getattr(torch, config.model.dtype), getattr(torch, config.checkpoint.export_dtype)
    model = build_on_meta(model_config, dtype, config.model.trust_remote_code)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    numbers = 1 + state_numbers(config.optim)
    return Sizes(
        num_weights,
        num_weights * dtype.itemsize * (1 + numbers),
        num_weights * dtype.itemsize * numbers,
        num_weights * export_dtype.itemsize,
        config.checkpoint.keep,
        num_saves(config),
    )


def num_saves(config: Config) -> int | None:
    """Checkpoints that a run writes; None where its steps follow from its pairs, which are not read here."""
    every, steps = config.checkpoint.save_every, config.train.steps
    if every is None:
        return 1
    return None if steps is None else math.ceil(steps / every)


@dataclass(frozen=True)
class Memory:
    """What a rank could still have where the run keeps weights, gradients and optimizer."""

    free: float
    on_host: bool


def measure_memory(subject: Subject, world: World) -> Memory:
    """Free memory of this rank's device; of the host, divided by its ranks, on a CPU and where the state lies there."""
    if world.device.type == "cpu" or subject.parallel.cpu_offload:
        return Memory(host_memory()[0] / world.local_size, True)
    free, _ = torch.cuda.mem_get_info(world.device)
    return Memory(free + torch.cuda.memory_reserved(world.device), False)


def describe_memory(subject: Subject, found: Sequence[Memory]) -> Finding:
    """A rank's share of the state beside the least free memory, and how to ask what a step needs in all."""
    if subject.sizes is None:
        return Finding(MODEL.name, ("none was named: --config FILE examines a run's own",))
    least = min(found, key=lambda one: one.free)
    state = subject.sizes.state * subject.parallel.replicate / len(found)
    where = "host memory" if least.on_host else "GPU memory"
    lines = [
        f"{subject.models[0].model_type}, {shown_count(subject.sizes.num_weights)} weights: with gradients and"
        f" optimizer {gib(state)} GiB a rank; {gib(least.free)} GiB of {where} are free",
        f"activations come on top; to see whether a step fits: {estimate_command(sys.argv[1:])}",
    ]
    if state <= least.free:
        return Finding(MODEL.name, tuple(lines))
    what = f"weights, gradients and optimizer take {gib(state)} GiB a rank, {gib(least.free)} GiB of {where} are free"
    return Finding(MODEL.name, tuple(lines), problems=(f"{what}; what helps: {_room(subject, least.on_host)}",))


def _room(subject: Subject, on_host: bool) -> str:
    helps = ["more ranks"]
    helps += ["parallel.replicate 1"] if subject.parallel.replicate > 1 else []
    helps += [] if on_host else ["a GPU that no other process uses (nvidia-smi)", "parallel.cpu_offload true"]
    return ", ".join(helps)


MODEL = Part("model", measure_memory, describe_memory, remedy="GPUs that nvidia-smi lists without an error")
