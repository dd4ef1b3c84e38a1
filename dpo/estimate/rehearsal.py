"""A step of a model with few layers, run by the trainer's own code on tensors that have sizes and no memory.

The ranks are not there either: a fake process group says that they are, and this one is rank 0, which holds the largest
part of what cannot be divided evenly. The micro-batch is run twice, as the first and as the last of a step, where the
step has several: those between them hold no more.
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

from dpo.batch.packing import PackedBatch, RowFormat, pack, padded_length
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree
from dpo.config import Config
from dpo.distributed.world import World, make_mesh
from dpo.estimate.compiled import compiled_backend
from dpo.estimate.stand_in import flex_attention_stood_in_for
from dpo.estimate.timeline import HEAD, Bytes, Moment, Timeline
from dpo.estimate.traffic import Groups, parameter_groups
from dpo.model.build import build_policy
from dpo.model.kernels import compile_layers
from dpo.model.parallelize import decoder_layers, is_compiled
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.step.objective import pair_losses


@dataclass(frozen=True)
class Rehearsal:
    """What was seen."""

    peaks: dict[Moment, Bytes]
    """See `Timeline.peaks`."""
    local_numbers: tuple[int, ...]
    """Numbers in this rank's part of each parameter."""
    groups: Groups
    """The sizes of what is gathered together."""


def rehearse(
    config: Config, model_config: PretrainedConfig, num_ranks: int, plan: StepPlan, trees: Sequence[Tree], on_cuda: bool
) -> Rehearsal:
    """A step of micro-batches of these trees on rank 0 of `num_ranks`; parallel.compute_dtype must not be auto.

    `on_cuda`: as the step would run there, with FlexAttention, a padded row, the head's float32 product and, unless
    parallel.compile is false, compiled layers. What those of a CPU save is not seen.
    """
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
        policy = build_policy(model_config, parallel, config.model.dtype, mesh, config.model.trust_remote_code)
        timeline.watch(policy.model)
        if on_cuda:
            stack.enter_context(flex_attention_stood_in_for())
            if with_compile:
                stack.enter_context(_NO_LIMIT())
                compile_layers(decoder_layers(policy.model), backend=compiled_backend(), dynamic=False)
            policy = replace(policy, device=torch.device("cuda"))  # for the head alone; its tensors lie nowhere
        parameters = tuple(parameter.to_local().numel() for parameter in policy.model.parameters())
        groups = parameter_groups(policy.model, decoder_layers(policy.model), num_ranks // parallel.replicate)
        _run(policy, config, _pack(policy, plan, trees, on_cuda), min(plan.num_micro_batches, 2), timeline)
    return Rehearsal(timeline.peaks, parameters, groups)


_NO_LIMIT = partial(
    dynamo.patch, recompile_limit=4096, accumulated_recompile_limit=4096, fail_on_recompile_limit_hit=True
)
"""As many lengths and models as are asked for; behind a limit layers would silently not be compiled."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector from running inside.

    A collection in the middle of a step makes some tensors live until the next full one, and when collections come
    depends on what ran before: the same step would be estimated at one peak here and another there.
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
    """The heart of `train.train_step`, its moments announced."""
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
    """A forward pass inside enters its moments, and so will its backward pass: a layer's begins when the gradient of
    its output is there.
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
        for handle in handles:  # what is computed again in the backward pass belongs to the backward pass
            handle.remove()
