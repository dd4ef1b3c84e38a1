"""Times steps of the config on this machine: the trainer's own step on the trainer's own plans and packed rows.

The model has random weights, since none are read: the time of a step does not depend on their values. The trees are
those that `dpo.estimate` plans, from the data where it is here. On a CPU, where no two parts of a step overlap, rows of
two tokens are timed as well: they take the seconds of a micro-batch that do not grow with its tokens (all-gathers,
copies of weights and gradients, reduce-scatters).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from dpo.adapters.choice import find_adapters
from dpo.adapters.inject import trained
from dpo.batch.packer import Packer, make_packer
from dpo.batch.packing import PackedBatch
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree
from dpo.config import Config, OptimConfig
from dpo.distributed.collectives import all_gather, on_main
from dpo.distributed.shards import local
from dpo.distributed.world import World, make_mesh
from dpo.doctor.model import free_on_device
from dpo.doctor.parts import Failure, Finding, Part, Subject, agreed, attempt
from dpo.doctor.rates import seconds_of
from dpo.estimate.at_start import choice_here
from dpo.estimate.choice import with_values, without_estimate
from dpo.estimate.lengths import Lengths
from dpo.estimate.words import gib
from dpo.model.build import build_policy
from dpo.model.policy import Policy, announce_backward, completion_logps, free_memory, reshard
from dpo.model.warm_up import warm_up
from dpo.step.metrics import peak_memory_bytes
from dpo.step.objective import pair_losses
from dpo.step.optim import make_optimizer, square_norm
from dpo.step.update import require_finite, train_step

REPEATS = 3
"""Times that the other work is timed."""

MAXIMUM_UPDATED = 2**26
"""Elements of a rank's shard that are updated by each optimizer: enough that latency does not matter."""

VARIANTS: Sequence[tuple[Literal["rmsprop", "adamw", "sgd"], float]] = (
    ("rmsprop", 0.0),
    ("rmsprop", 0.9),
    ("adamw", 0.0),
    ("sgd", 0.0),
    ("sgd", 0.9),
)
"""Optimizers by name and momentum."""

NUM_STEPS = 5
"""Steps that are timed."""

WARM_UP = 2
"""Steps before them: the optimizer makes its state in the first, and allocators keep what they got."""


@dataclass(frozen=True)
class Timed:
    """The measurements of a rank. Seconds are this rank's."""

    outcome: Literal["measured", "does_not_fit", "out_of_memory"]
    config: Config
    """With the layout that a run would decide."""
    seconds: tuple[float, ...] = ()
    forward_seconds: tuple[float, ...] = ()
    peak_memory: int = 0
    empty_seconds: tuple[float, float] | None = None
    """Of one and of three micro-batches of two tokens, whose gradients are reduced once; None on CUDA."""
    elements: int = 0
    """Trained parameters in this rank's shard."""
    updates: tuple["Updated", ...] = ()


@dataclass(frozen=True)
class Updated:
    """The update of some parameters by an optimizer on this rank."""

    optimizer: Literal["rmsprop", "adamw", "sgd"]
    momentum: bool
    elements: int
    seconds: float


def chosen_steps(lengths: Lengths) -> list[Sequence[Tree]]:
    """Returns the trees of NUM_STEPS steps, evenly spread over the planned steps, or repeated where there are fewer."""
    numbers = np.linspace(0, len(lengths.steps) - 1, NUM_STEPS).round().astype(int)
    return [lengths.steps[number] for number in numbers]


def measure_steps(subject: Subject, world: World) -> Timed:
    """Times steps of the subject's config, each on this rank, unless the estimate says that they do not fit. Every rank
    must get here, or the rest hang.

    A rank that runs out of memory alone leaves the others in a collective, until its timeout ends them.
    """
    assert subject.config is not None and subject.lengths is not None, "only a report has steps, and it has a config"
    config, fits = decided_config(subject, subject.config, subject.lengths, world)
    if not fits:
        return Timed("does_not_fit", config)
    try:
        return _timed(subject, config, world)
    except torch.OutOfMemoryError:
        return Timed("out_of_memory", config)
    finally:
        free_memory()


def decided_config(subject: Subject, config: Config, lengths: Lengths, world: World) -> tuple[Config, bool]:
    """Returns the config with `parallel` decided as a run decides it, and whether a step fits. Every rank must get
    here, or the rest hang.

    Args:
        subject: gives the model.
        config: the config, in which keys of `parallel` may be auto.
        lengths: the trees of some steps.
        world: the ranks.
    """
    least = min(all_gather(free_on_device(world)))
    model = (Path(config.model.path), subject.models[0])
    choice = on_main(world, lambda: attempt(lambda: choice_here(config, model, lengths, world, least)))
    if isinstance(choice, Failure):  # a run then takes these values too
        choice = replace(without_estimate(config.parallel.undecided, choice.reason), fits=True)
    dtype = str(subject.compute_dtype(world.device)).removeprefix("torch.")
    return with_values(config, choice.values | {"compute_dtype": dtype}), choice.fits


def _timed(subject: Subject, config: Config, world: World) -> Timed:
    assert subject.lengths is not None
    steps = chosen_steps(subject.lengths)
    packer = make_packer(config, world, subject.models[0])
    packer = replace(packer, ref_logps=_no_reference if config.loss.facts.uses_reference else None)
    plans = [packer.plan(trees) for trees in steps]
    policy = random_policy(config, subject.models[0], world)
    warm_up(policy, packer, world, (True, False))
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    seconds = _step_seconds(policy, packer, plans, config)
    return Timed(
        "measured",
        config,
        seconds,
        _forward_seconds(policy, packer.pack(plans[0])),
        peak_memory_bytes(world.device),
        _empty_seconds(policy, plans[0], packer, config) if world.device.type == "cpu" else None,
        sum(local(parameter).numel() for parameter in trained(policy.model.parameters())),
        tuple(_updates(trained(policy.model.parameters()), config)),
    )


def _no_reference(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> float:
    """Takes the place of the reference, whose values change no time."""
    return 0.0


def random_policy(config: Config, model_config: PretrainedConfig, world: World) -> Policy:
    """Returns the sharded policy with normal weights of standard deviation 0.02. Every rank must get here, or the rest
    hang.

    Args:
        config: gives the dtype of the master weights and how the model is sharded.
        model_config: the transformers config of the model.
        world: the ranks, after `start_devices`.
    """
    mesh, trust = make_mesh(world, config.parallel), config.model.trust_remote_code
    policy = agreed(
        lambda: build_policy(model_config, config.parallel, config.model.dtype, mesh, trust, find_adapters(config))
    )
    stored = policy.model.state_dict()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            local(parameter).normal_(0.0, 0.02)
        for name, buffer in policy.model.named_buffers():
            if name in stored:  # else `build_policy` has computed it
                buffer.fill_(1)
    return policy


def _step_seconds(policy: Policy, packer: Packer, plans: Sequence[StepPlan], config: Config) -> tuple[float, ...]:
    """Returns the seconds of a step of each plan, after WARM_UP steps of the first."""
    optimizer = make_optimizer(trained(policy.model.parameters()), config.optim)
    batches = [packer.pack(plan) for plan in plans]

    def step(number: int) -> float:
        step_batches = batches[number]
        return seconds_of(
            lambda: require_finite(train_step(policy, optimizer, step_batches, config, config.optim.lr, lambda: False)),
            policy.device,
        )

    for _ in range(WARM_UP):
        step(0)
    return tuple(step(number) for number in range(len(plans)))


def _forward_seconds(policy: Policy, batches: Sequence[PackedBatch]) -> tuple[float, ...]:
    """Returns the seconds of passes without gradient, as the reference is computed, after a first one."""

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                completion_logps(policy, batch.to(policy.device))

    seconds = tuple(seconds_of(forward, policy.device) for _ in range(REPEATS + 1))[1:]
    reshard(policy)
    return seconds


def _empty_seconds(policy: Policy, plan: StepPlan, packer: Packer, config: Config) -> tuple[float, float]:
    """Returns the seconds of one and of three micro-batches without trees; their gradients, which are 0, are reduced
    after the last. Of several measurements each is the fastest: other processes can only lengthen it.
    """
    once = replace(policy, parallel=replace(policy.parallel, sync_gradients="last_micro_batch"))
    empty = replace(plan, micro_batches=(((),),) * packer.num_lanes)
    batch = packer.pack(empty)[0].to(policy.device)

    def run(count: int) -> None:
        for number in range(count):
            announce_backward(once, is_last=number == count - 1)
            losses, _ = pair_losses(completion_logps(once, batch), batch, config.loss)
            (losses.sum() / batch.pairs_in_step).backward()
        policy.model.zero_grad(set_to_none=True)

    seconds = [(seconds_of(lambda: run(1), policy.device), seconds_of(lambda: run(3), policy.device)) for _ in range(4)]
    one, three = zip(*seconds[1:], strict=True)
    return min(one), min(three)


def _updates(parameters: Sequence[nn.Parameter], config: Config) -> Iterator[Updated]:
    """Yields the time of an update by every optimizer; the gradient's norm is computed too, as in a step. Where memory
    does not suffice for an optimizer, it is left out.
    """
    some = _first_of(parameters, MAXIMUM_UPDATED)
    for parameter in some:
        parameter.grad = parameter.detach().clone()
    for name, momentum in VARIANTS:
        optimizer = make_optimizer(some, OptimConfig(name=name, momentum=momentum))

        def update(optimizer: torch.optim.Optimizer = optimizer) -> None:
            square_norm(some)
            optimizer.step()

        try:
            seconds = [seconds_of(update, some[0].device) for _ in range(REPEATS + 1)][1:]
        except torch.OutOfMemoryError:
            continue
        yield Updated(name, momentum > 0, sum(local(p).numel() for p in some), min(seconds))
    for parameter in some:
        parameter.grad = None


def _first_of(parameters: Sequence[nn.Parameter], elements: int) -> list[nn.Parameter]:
    """Returns the first parameters, as many as have at most `elements` elements on this rank, at least one."""
    ends = np.cumsum([local(parameter).numel() for parameter in parameters])
    return list(parameters[: max(1, int((ends <= elements).sum()))])


def describe_steps(subject: Subject, ranks: Sequence[Timed]) -> Finding:
    """Returns the seconds of the steps on the slowest rank, or why there are none."""
    outcomes = {rank.outcome for rank in ranks}
    if outcomes != {"measured"}:
        reason = "a step does not fit into the memory" if "does_not_fit" in outcomes else "memory did not suffice"
        return Finding(STEPS.name, (f"not timed: {reason} (python -m dpo.estimate lists changes)",))
    slowest = [max(seconds) for seconds in zip(*(rank.seconds for rank in ranks), strict=True)]
    shown = ", ".join(f"{seconds:.3g}" for seconds in slowest)
    line = f"{NUM_STEPS} steps of the config, random weights: {shown} s; {gib(max(r.peak_memory for r in ranks))} GiB"
    return Finding(STEPS.name, (line,))


STEPS = Part(
    "steps",
    measure_steps,
    describe_steps,
    remedy="the remedies of the parts above",
    notice=lambda subject, world: f"{WARM_UP + NUM_STEPS} steps of the config, with random weights",
)
