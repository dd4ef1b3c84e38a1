"""The memory per rank that the config's model takes before any activation, and the disk that a run of it takes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpo.base.units import shown_bytes
from dpo.distributed.collectives import all_gather, on_main
from dpo.distributed.world import World
from dpo.doctor.parts import Failure, Finding, Part, Subject, agreed, attempt, with_remedy
from dpo.estimate.at_start import choice_here
from dpo.estimate.choice import Choice
from dpo.estimate.lengths import find_lengths
from dpo.estimate.words import gib, shown_count
from dpo.machine.facts import host_memory
from dpo.watch.failures import estimate_command


@dataclass(frozen=True)
class Memory:
    """The free memory of a rank, where the run keeps weights, gradients and optimizer."""

    free: float
    """Bytes."""
    on_host: bool
    """Whether it is host memory."""
    step: Choice | Failure | None = None
    """The estimate of a step, or why it failed; None where no config was given."""


def measure_memory(subject: Subject, world: World) -> Memory:
    """Returns the free memory of this rank, and the estimate of a step. Every rank must get here, or the rest hang."""
    memory = agreed(lambda: free_memory(subject, world))
    device = agreed(lambda: free_on_device(world))
    least = min(all_gather(device))
    return replace(memory, step=on_main(world, lambda: attempt(lambda: estimated_step(subject, world, least))))


def free_memory(subject: Subject, world: World) -> Memory:
    """Returns the free memory of this rank's device; of the host, divided by its ranks, on a CPU and with
    `parallel.cpu_offload`.
    """
    if world.device.type == "cpu" or subject.parallel.cpu_offload:
        return Memory(host_memory()[0] / world.local_size, True)
    return Memory(free_on_device(world), False)


def free_on_device(world: World) -> float:
    """Returns the bytes that are free or reserved by this process's allocator; of a CPU the host's free bytes, divided
    by its ranks.
    """
    if world.device.type == "cpu":
        return host_memory()[0] / world.local_size
    free, _ = torch.cuda.mem_get_info(world.device)
    return float(free + torch.cuda.memory_reserved(world.device))


def estimated_step(subject: Subject, world: World, memory: float) -> Choice | Failure | None:
    """Returns the estimate of a step whose pairs have the maximum length of the config.

    Args:
        subject: the config and its model.
        world: the ranks.
        memory: bytes that a rank may allocate.

    Returns:
        The choice of `parallel`; a Failure where the config has no maximum length; None where there is no config.
    """
    if subject.config is None:
        return None
    data, model_config = subject.config.data, subject.models[0]
    if data.max_length is None:
        return Failure("data.max_length is null")
    prompt = data.max_prompt_length or data.max_length // 2
    lengths = find_lengths(subject.config, model_config, prompt, data.max_length - prompt)  # given: no data is read
    return choice_here(subject.config, (Path(subject.config.model.path), model_config), lengths, world, memory)


def describe_memory(subject: Subject, memories: Sequence[Memory]) -> Finding:
    """Returns a rank's share of weights, gradients and optimizer beside the least free memory, and the estimate of a
    step.
    """
    if subject.sizes is None:
        return Finding(MODEL.name, ("no model was named: with --config FILE the model of a run is examined",))
    least = min(memories, key=lambda memory: memory.free)
    state = subject.sizes.state * subject.parallel.replicate / len(memories)
    where = "host memory" if least.on_host else "GPU memory"
    line = (
        f"{subject.models[0].model_type}, {shown_count(subject.sizes.num_parameters)} parameters: weights, gradients"
        f" and optimizer {shown_bytes(state)} per rank; {gib(least.free)} GiB of {where} are free"
    )
    lines, advice = _step(memories[0].step)
    problems = []
    if state > least.free:
        room = f"{gib(least.free)} GiB of {where} are free"
        shortage = f"weights, gradients and optimizer take {shown_bytes(state)} per rank, {room}"
        problems.append(with_remedy(shortage, _room(subject, least.on_host)))
    return Finding(MODEL.name, (line, *lines), problems=tuple(problems), advice=tuple(advice))


def _step(step: Choice | Failure | None) -> tuple[list[str], list[str]]:
    """Returns (lines, advice) about a step. A step that does not fit is only advice, because the run's own pairs may be
    shorter.
    """
    command = f"for the lengths of the data: {estimate_command(sys.argv[1:])}"
    if not isinstance(step, Choice):
        return [f"the memory of a step is not known{f' ({step.reason})' if step else ''}; {command}"], []
    if step.fits:
        return [f"pairs of data.max_length tokens: {step.line}"], []
    return [], [f"pairs of data.max_length tokens: {step.line}; {command}"]


def _room(subject: Subject, on_host: bool) -> str:
    helps = ["more ranks"]
    helps += ["parallel.replicate 1"] if subject.parallel.replicate > 1 else []
    helps += [] if on_host else ["a GPU that no other process uses (nvidia-smi)", "parallel.cpu_offload true"]
    return ", ".join(helps)


MODEL = Part("model", measure_memory, describe_memory, remedy="GPUs that nvidia-smi lists without an error")
