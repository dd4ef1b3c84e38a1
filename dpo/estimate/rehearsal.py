"""Runs a step of a model with few layers by the trainer's own code, on fake tensors, which have sizes and no memory.

The other ranks do not exist either: a fake process group pretends that they do. This process is rank 0, which holds the
largest shard of a tensor that cannot be divided evenly. Where the step has several micro-batches, the largest one runs
twice, as the first and as the last; the ones in between hold no more.

`memory.py` rehearses 3 and 4 layers and extrapolates. For example, a Llama of 8 layers (hidden size 256) on two CPU
ranks in float32, 192 tokens per micro-batch: KiB in the backward pass of the last layer, in the last micro-batch.
Rehearsed with all 8 layers it has the same bytes.

                          3 layers    4 layers    8 layers
    weights                4,867.8     6,148.8     6,148.8 + 4 x 1,281.0 = 11,272.8
    unsharded weights      7,173.0     7,173.0     7,173.0
    unsharded gradients   10,240.0    12,800.0    12,800.0 + 4 x 2,560.0 = 23,040.0
    activations           12,441.6    16,352.1    16,352.1 + 4 x 3,910.5 = 31,994.1
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from dpo.adapters.spec import AdapterSpec
from dpo.batch.packing import PackedBatch, RowFormat, pack, padded_length
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree
from dpo.config import Config
from dpo.distributed.world import World, make_mesh
from dpo.estimate.compiled import compiled_backend
from dpo.estimate.lengths import MicroBatch
from dpo.estimate.timeline import HEAD, Bytes, Moment, Timeline
from dpo.model.build import build_policy
from dpo.model.kernels import compile_layers
from dpo.model.parallelize import decoder_layers, is_compiled
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.step.objective import pair_losses


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal."""

    peaks: dict[Moment, Bytes]
    """The peak of each moment; see `Timeline.peaks`."""
    trained_elements: tuple[int, ...]
    """Elements of this rank's shard of each trained parameter."""
    weight_bytes: int
    """Bytes of this rank's shards of all parameters."""


def rehearse(
    config: Config,
    model_config: PretrainedConfig,
    num_ranks: int,
    micro_batch: MicroBatch,
    on_cuda: bool,
    adapters: AdapterSpec | None = None,
) -> Rehearsal:
    """Runs a step on fake tensors, as rank 0 of `num_ranks`, and returns its peaks.

    Args:
        config: `parallel.compute_dtype` must not be auto, and no key of `parallel` undecided.
        model_config: of the model with few layers.
        num_ranks: ranks of the fake process group.
        micro_batch: the plan of the step, and the trees of its micro-batch on this rank.
        on_cuda: whether the step runs as on CUDA: with FlexAttention, a padded row, the head's float32 product and,
            unless `parallel.compile` is false, compiled layers. On a CPU, memory that compiled layers save is not
            estimated.
        adapters: what is trained in place of the model's weights; None: all weights are.
    """
    plan, trees = micro_batch
    with_compile, parallel = is_compiled(config.parallel, torch.device("cuda")), replace(config.parallel, compile=False)
    assert not parallel.undecided, parallel.undecided
    world = World(0, num_ranks, 0, num_ranks, torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(_no_collection())
        stack.enter_context(_fake_group(num_ranks))
        mesh = make_mesh(world, parallel)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        offloaded = parallel.cpu_offload and on_cuda
        timeline = stack.enter_context(Timeline(model_config.vocab_size, offloaded, by_gloo=not on_cuda))
        trust = config.model.trust_remote_code
        policy = build_policy(model_config, parallel, config.model.dtype, mesh, trust, adapters)
        timeline.watch(policy.model)
        if on_cuda:
            # Only here: it registers operations with torch, which takes as long as all else of this room.
            from dpo.estimate.stand_in import flex_attention_stood_in_for

            stack.enter_context(flex_attention_stood_in_for())
            if with_compile:
                stack.enter_context(_NO_LIMIT())
                compile_layers(decoder_layers(policy.model), backend=compiled_backend(), dynamic=False)
            policy = replace(policy, device=torch.device("cuda"))  # for the head alone; its tensors lie nowhere
        parameters = list(policy.model.parameters())
        local = [parameter.to_local() for parameter in parameters]
        elements = tuple(
            shard.numel() for shard, parameter in zip(local, parameters, strict=True) if parameter.requires_grad
        )
        weight_bytes = sum(shard.nbytes for shard in local)
        _run(policy, config, _pack(policy, plan, trees, on_cuda), min(plan.num_micro_batches, 2), timeline)
    return Rehearsal(timeline.peaks, elements, weight_bytes)


_NO_LIMIT = partial(
    dynamo.patch, recompile_limit=4096, accumulated_recompile_limit=4096, fail_on_recompile_limit_hit=True
)
"""Allows as many lengths and models as are asked for: beyond dynamo's limits layers would silently not be compiled."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disables the garbage collector inside.

    A collection in the middle of a step makes some tensors live until the next full collection, and when collections
    happen depends on the work before. The same step would then have different estimates.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _fake_group(num_ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _pack(policy: Policy, plan: StepPlan, trees: Sequence[Tree], on_cuda: bool) -> PackedBatch:
    windows, row_length = ((), padded_length) if on_cuda else (policy.windows, int)
    return pack(trees, plan, lambda *_: 0.0, RowFormat(windows, torch.device("cpu"), policy.dtype, row_length))


def _run(policy: Policy, config: Config, batch: PackedBatch, num_micro_batches: int, timeline: Timeline) -> None:
    """Runs the forward and backward passes as `dpo.step.update.train_step` does, and announces each moment."""
    for number in range(num_micro_batches):
        announce_backward(policy, is_last=number == num_micro_batches - 1)
        timeline.enter(Moment(number, "forward", 0))
        with _announced_layers(policy, number, timeline):
            pi_logps = completion_logps(policy, batch)
        losses, _ = pair_losses(pi_logps, batch, config.loss)
        timeline.enter(Moment(number, "backward", HEAD))
        (losses.sum() / batch.pairs_in_step).backward()
        del pi_logps, losses


@contextmanager
def _announced_layers(policy: Policy, number: int, timeline: Timeline) -> Iterator[None]:
    """Announces the moments of a forward pass inside, and of its backward pass: a layer's backward pass begins when the
    gradient of its output is there.
    """
    layers = decoder_layers(policy.model)

    def announce(layer: nn.Module, inputs: Any, output: Any) -> None:
        index = layers.index(layer)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda grad: timeline.enter(Moment(number, "backward", index)))
        timeline.enter(Moment(number, "forward", index + 1 if index + 1 < len(layers) else HEAD))

    handles = [layer.register_forward_hook(announce) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:  # else recomputation in the backward pass would announce forward moments
            handle.remove()
