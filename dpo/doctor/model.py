"""What the config's model takes: of the memory of every rank, before any activation, and of the disk."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from dpo.config import Config
from dpo.distributed.collectives import all_gather, on_main
from dpo.distributed.failures import estimate_command
from dpo.distributed.world import World
from dpo.doctor.parts import Failure, Finding, Part, Sizes, Subject, agreed, attempt
from dpo.doctor.words import gib
from dpo.estimate.at_start import choice_here
from dpo.estimate.choice import Choice
from dpo.estimate.lengths import find_lengths
from dpo.estimate.words import shown_count
from dpo.machine.facts import host_memory
from dpo.model.build import build_on_meta
from dpo.step.optim import optimizer_elements


def sizes_of(config: Config, model_config: PretrainedConfig) -> Sizes:
    """The sizes of a run of this model. Raises UserError where the model cannot be trained."""
    dtype, export_dtype = getattr(torch, config.model.dtype), getattr(torch, config.checkpoint.export_dtype)
    model = build_on_meta(model_config, dtype, config.model.trust_remote_code)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    numbers = 1 + optimizer_elements(config.optim)
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
    step: Choice | Failure | None = None
    """What the estimate says of a step, or why it does not; None where no config was given."""


def measure_memory(subject: Subject, world: World) -> Memory:
    """Free memory of this rank, and what a step needs. Every rank must get here."""
    free = agreed(lambda: free_memory(subject, world))
    device = agreed(lambda: free_on_device(world))
    least = min(all_gather(device))
    return replace(free, step=on_main(world, lambda: attempt(lambda: estimated_step(subject, world, least))))


def free_memory(subject: Subject, world: World) -> Memory:
    """Of this rank's device; of the host, divided by its ranks, on a CPU and where the run's state lies there."""
    if world.device.type == "cpu" or subject.parallel.cpu_offload:
        return Memory(host_memory()[0] / world.local_size, True)
    return Memory(free_on_device(world), False)


def free_on_device(world: World) -> float:
    """Bytes that are free, or held by this process's allocator; of a CPU those of the host, divided by its ranks."""
    if world.device.type == "cpu":
        return host_memory()[0] / world.local_size
    free, _ = torch.cuda.mem_get_info(world.device)
    return float(free + torch.cuda.memory_reserved(world.device))


def estimated_step(subject: Subject, world: World, memory: float) -> Choice | Failure | None:
    """What a step of the longest pairs of the config needs and takes, with so many bytes on every device."""
    if subject.config is None:
        return None
    data, model_config = subject.config.data, subject.models[0]
    if data.max_length is None:
        return Failure("data.max_length is null")
    prompt = data.max_prompt_length or data.max_length // 2
    lengths = find_lengths(subject.config, model_config, prompt, data.max_length - prompt)  # given: no data is read
    return choice_here(subject.config, (Path(subject.config.model.path), model_config), lengths, world, memory)


def describe_memory(subject: Subject, found: Sequence[Memory]) -> Finding:
    """A rank's share of the state beside the least free memory, and what a step needs and takes by the estimate."""
    if subject.sizes is None:
        return Finding(MODEL.name, ("none was named: --config FILE examines a run's own",))
    least = min(found, key=lambda one: one.free)
    state = subject.sizes.state * subject.parallel.replicate / len(found)
    where = "host memory" if least.on_host else "GPU memory"
    line = (
        f"{subject.models[0].model_type}, {shown_count(subject.sizes.num_weights)} weights: with gradients and"
        f" optimizer {gib(state)} GiB a rank; {gib(least.free)} GiB of {where} are free"
    )
    lines, advice = _step(found[0].step)
    problems = []
    if state > least.free:
        what = (
            f"weights, gradients and optimizer take {gib(state)} GiB a rank, {gib(least.free)} GiB of {where} are free"
        )
        problems.append(f"{what}; what helps: {_room(subject, least.on_host)}")
    return Finding(MODEL.name, (line, *lines), problems=tuple(problems), advice=tuple(advice))


def _step(step: Choice | Failure | None) -> tuple[list[str], list[str]]:
    """What is told of a step, and what is only a note: where it does not fit, the run's own pairs may be shorter."""
    command = f"for the lengths of the data: {estimate_command(sys.argv[1:])}"
    if not isinstance(step, Choice):
        return [f"what a step needs is not known{f' ({step.reason})' if step else ''}; {command}"], []
    if step.fits:
        return [f"pairs of data.max_length tokens: {step.line}"], []
    return [], [f"pairs of data.max_length tokens: {step.line}; {command}"]


def _room(subject: Subject, on_host: bool) -> str:
    helps = ["more ranks"]
    helps += ["parallel.replicate 1"] if subject.parallel.replicate > 1 else []
    helps += [] if on_host else ["a GPU that no other process uses (nvidia-smi)", "parallel.cpu_offload true"]
    return ", ".join(helps)


MODEL = Part("model", measure_memory, describe_memory, remedy="GPUs that nvidia-smi lists without an error")
