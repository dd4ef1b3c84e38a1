"""The model that is trained: built without memory, divided over the mesh, loaded shard by shard, run on packed
trees.
"""

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dpo.batch.block_mask import Window
from dpo.batch.packing import PackedBatch, RowFormat, padded_length
from dpo.config import ParallelConfig
from dpo.model.kernels import Graphs
from dpo.model.log_probs import Head, completion_log_probs
from dpo.model.parallelize import fsdp_modules


@dataclass(frozen=True)
class Policy:
    """A sharded model and what must be known to run it."""

    model: Any
    windows: tuple[Window, ...]
    """The attention windows of its layers."""
    device: torch.device
    dtype: torch.dtype
    """Of the master weights and the log-probabilities."""
    parallel: ParallelConfig
    head_bytes: int
    """The most bytes that everything as wide as the vocabulary takes at once."""
    graphs: Graphs
    """Graphs that its layers have taken so far; empty where they are not compiled."""

    @property
    def config(self) -> PretrainedConfig:
        """Returns the model's config."""
        config: PretrainedConfig = self.model.config
        return config

    @property
    def row_format(self) -> RowFormat:
        """Returns how rows are packed for this model on its device."""
        return RowFormat(self.windows, self.device, self.dtype, padded_length if self.device.type == "cuda" else int)


def free_memory() -> None:
    """Frees models that nobody holds any more: a sharded one refers to itself, and would wait for a collection."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def completion_logps(policy: Policy, batch: PackedBatch) -> Tensor:
    """Returns the log-probability of each completion given its prompt, (B,) nats, with gradient where enabled.

    Every rank must get here the same number of times, or the rest hang: FSDP all-gathers the parameters on the way.
    """
    logps: Tensor = policy.model.logps(batch, policy.head_bytes, policy.device.type)
    return logps


def _forward_logps(
    model: PreTrainedModel, batch: PackedBatch, head_bytes: int, device_type: str | None = None
) -> Tensor:
    """Runs inside the root's FSDP forward, where the head's weights are whole; only rows that predict meet the head."""
    hidden = model.base_model(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        layout=batch.layout,
        use_cache=False,
    ).last_hidden_state[0]
    linear = model.get_output_embeddings()
    head = Head(linear.weight, linear.bias, head_bytes, device_type)
    return completion_log_probs(hidden[batch.predict_idxs], head, batch.targets, batch.lengths)


def announce_backward(policy: Policy, is_last: bool) -> None:
    """Says whether the coming backward pass reduces gradients over ranks (on every micro-batch, or on the last alone)
    and whether parameters stay whole after it (up to the last, where they outlive the forward pass).
    """
    reduces = is_last or policy.parallel.sync_gradients == "every_micro_batch"
    policy.model.set_requires_gradient_sync(reduces)
    policy.model.set_reshard_after_backward(is_last or policy.parallel.reshard_after_forward)
    # What was reduced over copies (HSDP) would else stay beside the next micro-batch's activations.
    policy.model.set_is_last_backward(reduces)


def reshard(policy: Policy) -> None:
    """Frees whole parameters that a pass without gradients left behind: they would outlive a change of the weights."""
    for module in fsdp_modules(policy.model):
        module.reshard()
