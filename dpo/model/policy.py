"""The policy: a sharded model, and its forward pass on packed trees (`build.py` makes it).

A step of two micro-batches on a model of layers 0 and 1; the root holds the embedding, the last norm and the head. FSDP
does, in this order, with `parallel.sync_gradients` last_micro_batch:

    reshard_after_forward       true                                                      false
    micro-batch 1   forward     unshard root, 0; reshard 0; unshard 1; reshard 1          unshard root, 0, 1
                    backward    unshard 1; reshard 1; unshard 0; reshard 0, root          nothing
    micro-batch 2   forward     as in micro-batch 1                                       nothing
                    backward    unshard 1; reshard, reduce-scatter 1; unshard 0;          reshard, reduce-scatter 1;
                                reshard, reduce-scatter 0; reshard, reduce-scatter root   the same 0; the same root

With every_micro_batch the backward pass of micro-batch 1 reduce-scatters 1, 0 and root as well: a rank then keeps its
shard of the gradient between micro-batches, and with last_micro_batch the unsharded gradient.
"""

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dpo.adapters.spec import AdapterSpec
from dpo.batch.block_mask import Window
from dpo.batch.packing import PackedBatch, RowFormat, padded_length
from dpo.config import ParallelConfig
from dpo.model.kernels import Graphs
from dpo.model.log_probs import Head, completion_log_probs
from dpo.model.parallelize import fsdp_modules


@dataclass(frozen=True)
class Policy:
    """A sharded model, and the settings of its forward and backward pass."""

    model: Any
    """A transformers model on which `fully_shard` was called."""
    windows: tuple[Window, ...]
    """The distinct attention windows of its layers."""
    device: torch.device
    """The device of the forward pass; with CPU offloading the parameters are on the host."""
    dtype: torch.dtype
    """The dtype of the master weights and of log-probabilities."""
    parallel: ParallelConfig
    head_bytes: int
    """The maximum bytes of all tensors as wide as the vocabulary at a time."""
    graphs: Graphs
    """The graphs compiled for its layers so far; empty where layers are not compiled."""
    adapters: AdapterSpec | None = None
    """What is trained in place of the model's weights; None: all weights are."""

    @property
    def config(self) -> PretrainedConfig:
        """Returns the model's config."""
        config: PretrainedConfig = self.model.config
        return config

    @property
    def row_format(self) -> RowFormat:
        """Returns the format of packed rows for this model and its device."""
        return RowFormat(self.windows, self.device, self.dtype, padded_length if self.device.type == "cuda" else int)


def free_memory() -> None:
    """Frees the memory of models without references: a sharded model is a reference cycle, which only the garbage
    collector frees.
    """
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
    """Returns the log-probabilities (B,) of a batch: the model's method `logps`.

    `fully_shard` treats it as a forward method of the root, so that the head's weights are unsharded inside it. The
    head computes only the rows that predict a completion token.
    """
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
    """Prepares FSDP for the next backward pass; `is_last` is true for the last micro-batch of a step.

    Gradients are reduce-scattered after every micro-batch or after the last one alone, by `parallel.sync_gradients`.
    Parameters stay unsharded between micro-batches unless `parallel.reshard_after_forward`; after the last they are
    resharded.
    """
    reduces = is_last or policy.parallel.sync_gradients == "every_micro_batch"
    policy.model.set_requires_gradient_sync(reduces)
    policy.model.set_reshard_after_backward(is_last or policy.parallel.reshard_after_forward)
    # Else gradients that were all-reduced over copies (HSDP) stay in memory during the next micro-batch.
    policy.model.set_is_last_backward(reduces)


def reshard(policy: Policy) -> None:
    """Reshards all parameters that a forward pass without gradients left unsharded; they would otherwise be used again
    after the optimizer has changed the shards.
    """
    for module in fsdp_modules(policy.model):
        module.reshard()
