"""Composes activation checkpointing, compilation and sharding onto a model.

A Llama of two layers, with `activation_checkpointing` full and compilation; the lines stand in the order of the calls:

    model.layers.0.forward, model.layers.1.forward    wrapped in `checkpoint`
    model.layers.0, model.layers.1                    compiled: the call, with the checkpointed forward inside
    model.layers.0      fully_shard, unit of 9 parameters: q, k, v, o, gate, up, down and 2 norms
    model.layers.1      fully_shard, unit of 9 parameters
    the whole model     fully_shard, the root unit of the other 3: embed_tokens, norm and lm_head (2 if they are tied)

The parameters of a unit are all-gathered together, and their gradients reduce-scattered together. `model.logps` is a
forward method of the root, since it reads the head's weights.
"""

import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo.config import ParallelConfig
from dpo.model.kernels import Graphs, compile_layers


def parallelize(model: PreTrainedModel, mesh: DeviceMesh, parallel: ParallelConfig, compute: torch.dtype) -> Graphs:
    """Composes activation checkpointing, compilation and sharding onto a model, in this order.

    Args:
        model: a model on the meta device, modified in place; its code does not change.
        mesh: the ranks over which parameters are sharded.
        parallel: how the model is sharded, checkpointed and compiled; nothing is auto.
        compute: the dtype of the forward and backward pass.

    Returns:
        The counter of the compiled layers' graphs, which goes on counting while they run.
    """
    layers = decoder_layers(model)
    if parallel.activation_checkpointing != "none":
        checkpoint_layers(layers, _CHECKPOINTS[parallel.activation_checkpointing])
    compiled = is_compiled(parallel, torch.device(mesh.device_type))
    graphs = compile_layers(layers) if compiled else Counter()
    shard: Callable[..., Any] = partial(
        fully_shard,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=getattr(torch, parallel.reduce_dtype)),
        offload_policy=_offload_policy(parallel, pinned=mesh.device_type == "cuda"),
    )
    for layer in layers:
        shard(layer, reshard_after_forward=parallel.reshard_after_forward)
    shard(model, reshard_after_forward=False)  # backward of the head follows its forward at once
    register_fsdp_forward_method(model, "logps")
    for module in fsdp_modules(model):
        # The loss is divided by the global number of pairs, so gradients are summed over ranks, not averaged. gloo
        # refuses the first line without the second.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return graphs


def _offload_policy(parallel: ParallelConfig, pinned: bool) -> OffloadPolicy:
    """Returns FSDP's offload policy; pins the memory of offloaded parameters where there is an accelerator."""
    return CPUOffloadPolicy(pin_memory=pinned) if parallel.cpu_offload else OffloadPolicy()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the decoder layers in order, each of which is sharded, checkpointed and compiled by itself."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Returns the modules on which `fully_shard` was called: the root and the layers."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def checkpoint_layers(layers: Sequence[nn.Module], run: Callable[..., Any]) -> None:
    """Wraps the forward of each layer in `run`, a `torch.utils.checkpoint.checkpoint`, where there are gradients.

    It wraps the layer's forward, not its call, so that FSDP's hooks run once, and torch.compile, which compiles the
    call, sees which results to save. transformers wraps the forward since 5.23; before, it wrapped the call, and
    nothing was saved under torch.compile.
    """

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = partial(type(layer).forward, layer, **kwargs)
        if not torch.is_grad_enabled():
            return plain(*args)
        return run(plain, *args)

    for layer in layers:
        layer.forward = types.MethodType(forward, layer)


_ATTENTION_OPS = ("scaled_dot_product", "inductor_compiled_code", "flex_attention")
"""Substrings of the names of operators whose results selective checkpointing saves: attention on a CPU; FlexAttention
compiled alone; FlexAttention in a compiled layer."""


def _selective_contexts() -> Any:
    """Returns the contexts of selective checkpointing, which saves the results of attention and of every second matrix
    product of a layer, and recomputes the rest.
    """
    num_products = {False: 0, True: 0}

    def choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(op)
        if any(part in name for part in _ATTENTION_OPS):
            return CheckpointPolicy.MUST_SAVE
        if name in ("aten.mm.default", "aten.addmm.default"):
            num_products[context.is_recompute] += 1
            if num_products[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose)


_CHECKPOINTS: Mapping[str, Callable[..., Any]] = {
    "selective": partial(checkpoint, use_reentrant=False, context_fn=_selective_contexts),
    "full": partial(checkpoint, use_reentrant=False),
}
"""The checkpoint functions by `parallel.activation_checkpointing`."""


def compute_dtype(parallel: ParallelConfig, master: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype of the forward and backward pass; `auto` is bfloat16 on CUDA (float64 where the master weights
    are), and the dtype of the master weights on a CPU.

    Args:
        parallel: gives `compute_dtype`.
        master: the dtype of the master weights.
        device: the device of the forward pass.
    """
    if parallel.compute_dtype != "auto":
        dtype: torch.dtype = getattr(torch, parallel.compute_dtype)
        return dtype
    return torch.bfloat16 if device.type == "cuda" and master == torch.float32 else master


def is_compiled(parallel: ParallelConfig, device: torch.device) -> bool:
    """Returns whether layers are compiled by torch.compile; `auto` is true on CUDA only."""
    return device.type == "cuda" if parallel.compile == "auto" else parallel.compile
