"""What a layout needs of a rank's memory and of a step's time: the rehearsal and the formulas on the plans of steps."""

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
class Layout:
    """What is tried: a config and how many ranks run it."""

    config: Config
    num_ranks: int


def with_dtype(config: Config, device: Device) -> Config:
    """The config with parallel.compute_dtype auto replaced by what it means on the device."""
    kind = torch.device("cpu" if device.is_cpu else "cuda")
    dtype = str(compute_dtype(config.parallel, getattr(torch, config.model.dtype), kind)).removeprefix("torch.")
    return replace(config, parallel=replace(config.parallel, compute_dtype=dtype))  # type: ignore[arg-type]  # one of its words


def plans_of(layout: Layout, model_config: PretrainedConfig, steps: Sequence[Sequence[Tree]]) -> list[StepPlan]:
    """The plans of some steps."""
    tokens, costs = layout.config.batch.tokens_per_micro_batch, cost_model(model_config)
    return [plan_step(trees, layout.num_ranks, tokens, costs) for trees in steps]


def memory_of(
    layout: Layout, model_config: PretrainedConfig, lengths: Lengths, device: Device
) -> tuple[Memory, MicroBatch]:
    """The memory of the micro-batch that needs the most, and that micro-batch."""
    plans = plans_of(layout, model_config, (lengths.longest, *lengths.steps))
    found = [
        (step_memory(layout.config, model_config, layout.num_ranks, *one, on_cuda=not device.is_cpu), one)
        for one in largest_micro_batches(plans)
    ]
    return max(found, key=lambda pair: pair[0].peak)


def needed_bytes(layout: Layout, model_config: PretrainedConfig, lengths: Lengths, device: Device) -> float:
    """What must fit into the device's memory."""
    return device.needed(*memory_of(layout, model_config, lengths, device)[0].totals)
