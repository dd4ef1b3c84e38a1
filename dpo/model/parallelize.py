"""How a model is divided over the ranks: activation checkpointing, compilation and sharding, composed onto it."""

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
    """Composes checkpointing, compilation and sharding onto a model, in this order; the model knows of none of them.
    Gives the count of the compiled layers' graphs, which goes on while they run.
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
    shard(model, reshard_after_forward=False)  # its backward, the head's, begins where its forward ends
    register_fsdp_forward_method(model, "logps")
    for module in fsdp_modules(model):
        # The loss is divided by the global number of pairs, so gradients are summed over ranks, not averaged. Without
        # the second line gloo refuses the first.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return graphs


def _offload_policy(parallel: ParallelConfig, pinned: bool) -> OffloadPolicy:
    return CPUOffloadPolicy(pin_memory=pinned) if parallel.cpu_offload else OffloadPolicy()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, in order: what is sharded, checkpointed and compiled one by one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The root and the layers."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def checkpoint_layers(layers: Sequence[nn.Module], run: Callable[..., Any]) -> None:
    """Has each layer's forward run by `run`, a `torch.utils.checkpoint.checkpoint`, where there are gradients.

    It is the layer's forward that is wrapped, not its call: FSDP's hooks then run once, and torch.compile, which takes
    the call, sees what is to be kept. transformers wraps the forward since 5.23; before, it wraps the call, and under
    torch.compile nothing is kept.
    """

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = partial(type(layer).forward, layer, **kwargs)
        if not torch.is_grad_enabled():
            return plain(*args)
        return run(plain, *args)

    for layer in layers:
        layer.forward = types.MethodType(forward, layer)


_ATTENTION_OPS = ("scaled_dot_product", "inductor_compiled_code", "flex_attention")
"""Substrings of the names of operations whose results selective checkpointing keeps: attention on a CPU; FlexAttention
compiled alone; FlexAttention in a compiled layer."""


def _selective_contexts() -> Any:
    """Keeps the results of attention and of every second matrix product of a layer; the rest is computed again."""
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
"""By parallel.activation_checkpointing."""


def compute_dtype(parallel: ParallelConfig, master: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the forward and backward pass; `auto` is bfloat16 on CUDA, the master weights' on a CPU."""
    if parallel.compute_dtype != "auto":
        dtype: torch.dtype = getattr(torch, parallel.compute_dtype)
        return dtype
    return torch.bfloat16 if device.type == "cuda" and master == torch.float32 else master


def is_compiled(parallel: ParallelConfig, device: torch.device) -> bool:
    """Whether layers go through torch.compile; `auto` is yes on CUDA alone."""
    return device.type == "cuda" if parallel.compile == "auto" else parallel.compile
