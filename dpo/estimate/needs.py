"""The plans and the memory of a trial: a config on a number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from dpo.batch.costs import cost_model
from dpo.batch.plan import StepPlan, plan_step
from dpo.batch.trees import Tree
from dpo.config import Config
from dpo.estimate.devices import Device
from dpo.estimate.lengths import Lengths, MicroBatch, largest_micro_batches
from dpo.estimate.memory import Memory, step_memory
from dpo.model.parallelize import compute_dtype


@dataclass(frozen=True)
class Trial:
    """A config and the number of ranks that run it, to be estimated."""

    config: Config
    num_ranks: int

    @property
    def num_lanes(self) -> int:
        """Returns the number of lanes over which the trees of a step are divided: each lane is one rank, as in
        `World.num_lanes`.
        """
        return self.num_ranks


def with_dtype(config: Config, device: Device) -> Config:
    """Returns the config with `parallel.compute_dtype` auto replaced by its meaning on the device."""
    kind = torch.device("cpu" if device.is_cpu else "cuda")
    dtype = str(compute_dtype(config.parallel, getattr(torch, config.model.dtype), kind)).removeprefix("torch.")
    return replace(config, parallel=replace(config.parallel, compute_dtype=dtype))  # type: ignore[arg-type]  # one of its words


def plans_of(trial: Trial, model_config: PretrainedConfig, steps: Sequence[Sequence[Tree]]) -> list[StepPlan]:
    """Plans some steps.

    Args:
        trial: gives the ranks and the tokens per micro-batch.
        model_config: the transformers config of the model, for the cost of a tree.
        steps: the trees of each step.

    Returns:
        The plan of each step.
    """
    tokens, costs = trial.config.batch.tokens_per_micro_batch, cost_model(model_config)
    return [plan_step(trees, trial.num_lanes, tokens, costs) for trees in steps]


def memory_of(
    trial: Trial, model_config: PretrainedConfig, lengths: Lengths, device: Device
) -> tuple[Memory, MicroBatch]:
    """Returns the memory of the micro-batch that needs the most, and that micro-batch.

    Args:
        trial: the config, with `parallel` decided, and the number of ranks.
        model_config: the transformers config of the whole model.
        lengths: the trees of the steps.
        device: the device of every rank.
    """
    plans = plans_of(trial, model_config, (lengths.longest, *lengths.steps))
    memories = [
        (step_memory(trial.config, model_config, trial.num_ranks, *micro_batch, on_cuda=not device.is_cpu), micro_batch)
        for micro_batch in largest_micro_batches(plans)
    ]
    return max(memories, key=lambda memory_and_batch: memory_and_batch[0].peak)


def needed_bytes(trial: Trial, model_config: PretrainedConfig, lengths: Lengths, device: Device) -> float:
    """Returns the bytes that must fit into the device's memory.

    Args:
        trial: the config, with `parallel` decided, and the number of ranks.
        model_config: the transformers config of the whole model.
        lengths: the trees of the steps.
        device: the device of every rank.
    """
    return device.needed(*memory_of(trial, model_config, lengths, device)[0].totals)
