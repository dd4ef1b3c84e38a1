"""Builds a run from its checked input: policy, reference log-probabilities, answers, optimizer."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpo.adapters.inject import trained
from dpo.adapters.switch import adapters_off
from dpo.base.errors import Preempted, UserError
from dpo.batch.costs import ForwardFlops, Trained, model_flops
from dpo.batch.packer import Packer, make_packer
from dpo.batch.packing import PackedBatch
from dpo.batch.trees import Tree, grow_trees
from dpo.board.sink import Answer
from dpo.checkpoint.store import load_checkpoint
from dpo.config import Config
from dpo.disk.storage import least_beside
from dpo.distributed.collectives import all_gather, on_main
from dpo.distributed.preemption import StopRequest, never
from dpo.distributed.world import World
from dpo.estimate.parameters import trained_of
from dpo.machine.peaks import peak_flops
from dpo.model.build import read_start
from dpo.model.parallelize import compute_dtype
from dpo.model.policy import Policy, free_memory, reshard
from dpo.model.source import SourceModel
from dpo.model.warm_up import load_and_warm
from dpo.ref_logps.cache import RefCache, open_cache
from dpo.ref_logps.fill import ReferencePass, fill, lookup
from dpo.run.answers import AnswerBook, answer, keep_answers, prepare_answers
from dpo.run.folder import Start
from dpo.run.identity import identity_of
from dpo.run.inputs import Inputs
from dpo.run_folder.files import LOG
from dpo.step.optim import make_optimizer
from dpo.terminal.console import open_log, say
from dpo.train.phases import Phases


def _nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Hooks:
    """What a start of a run asks and tells beside its steps. By default nobody asks, and nobody is told."""

    stop_requested: StopRequest = never
    check_lock: Callable[[], None] = _nothing
    """Raises FolderLost, on rank 0, where another start has taken the run folder (see `dpo.train.hold`)."""
    phases: Phases = field(default_factory=lambda: Phases(time.monotonic()))
    """Of this start; the last of them ends with its first step."""


@dataclass(frozen=True)
class Run:
    """All parts of a run, ready for its next step."""

    config: Config
    world: World
    inputs: Inputs
    start: Start
    policy: Policy
    optimizer: torch.optim.Optimizer
    packer: Packer
    reference_pass: ReferencePass | None
    """None where the loss has no reference."""
    answers: AnswerBook | None
    """None where sampled answers are not configured or not possible (see `prepare_answers`)."""
    peak_flops: float | None
    """Peak FLOPs per second of all ranks together; None where a device is not in the table of data sheets."""
    trained: Trained
    """What of the model has gradients, for the FLOPs of a step."""
    hooks: Hooks

    @property
    def dir(self) -> Path:
        """Returns the run folder."""
        return Path(str(self.config.train.run_dir))

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Returns the facts that a checkpoint records, so that only the same run resumes from it."""
        return identity_of(self.config, self.inputs)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype of the forward and backward pass."""
        return compute_dtype(self.config.parallel, self.policy.dtype, self.world.device)

    @property
    def begins_at_reference(self) -> bool:
        """Returns whether the policy of the next step is the reference: a fresh run, whose first step is checked."""
        same = self.inputs.model.hash == self.inputs.reference.hash
        return self.start.step == 0 and self.reference_pass is not None and same

    def best_seconds(self, forward_flops: ForwardFlops) -> float | None:
        """Returns the seconds of a step at the devices' peak, given the FLOPs of its forward pass over all lanes."""
        return model_flops(forward_flops, self.trained) / self.peak_flops if self.peak_flops else None

    def trees(self, step: int) -> list[Tree]:
        """Returns the trees of a step, of all lanes. They depend on (seed, step) alone."""
        return grow_trees(self.inputs.data.train.pairs(self.inputs.order.items(step, self.inputs.last_item)))

    def batches(self, step: int) -> list[PackedBatch]:
        """Returns this lane's micro-batches of a step."""
        plan = self.packer.plan(self.trees(step))
        if plan.num_oversized and self.world.is_main:
            say(f"step {step}: {plan.num_oversized} trees are over batch.tokens_per_micro_batch; each runs alone")
        return self.packer.pack(plan)

    def answers_after(self, step: int) -> list[Answer]:
        """Returns the policy's answers to the evaluation prompts after `step` steps, and writes them to the run folder.

        At step 0 of a run that begins at its reference, returns the reference's answers without generating.
        Every rank must get here, or the rest hang.
        """
        if self.answers is None:
            return []
        if step == 0 and self.begins_at_reference:
            return keep_answers(self.answers, step, self.answers.references)
        return answer(self.policy, self.answers, step)


def build_run(config: Config, world: World, inputs: Inputs, start: Start, hooks: Hooks) -> Run:
    """Builds a run at step 0, or at the step of its checkpoint. Every rank must get here, or the rest hang.

    The log begins when the policy's weights are read, before hours of the reference pass: a start that is refused
    leaves the run folder as it was.

    Args:
        config: with all values of `parallel` decided.
        world: all ranks.
        inputs: the models and data.
        start: the checkpoint to load, if any.
        hooks: of this start.

    Raises:
        Preempted: on every rank, where any rank was asked to stop while the reference was computed.
    """
    assert not config.parallel.undecided, config.parallel.undecided
    packer, reference_pass = make_packer(config, world, inputs.model.config), None
    passes = _passes(config, inputs, start)
    with log_of_failure(config, world):
        policy = load_and_warm(config, world, inputs.model, packer, passes)
    write_log(config, world)
    hooks.phases.end("model")
    reference = _reference_loader(config, world, inputs, policy, packer)
    with _as_reference(policy, inputs.reference):
        if config.loss.facts.uses_reference:
            try:
                cache = _cache(config, inputs, start, world)
                sets = [inputs.data.train, inputs.data.eval]
                rows, reference_pass = fill(cache, sets, reference, packer, world, hooks.stop_requested)
            except Preempted:
                raise Preempted(start.step, is_saved=False) from None
            packer = replace(packer, ref_logps=lookup(rows))
        answers = prepare_answers(config, world, inputs, reference)
    reference.cache_clear()
    hooks.phases.end("reference")
    free_memory()
    reshard(policy)
    optimizer = make_optimizer(trained(policy.model.parameters()), config.optim)
    if start.checkpoint:
        load_checkpoint(start.checkpoint, policy.model, optimizer)
        hooks.phases.end("checkpoint")
    return Run(
        config=config,
        world=world,
        inputs=inputs,
        start=start,
        policy=policy,
        optimizer=optimizer,
        packer=packer,
        reference_pass=reference_pass,
        answers=answers,
        peak_flops=_peak_flops(config, policy, world),
        trained=on_main(world, lambda: trained_of(config, inputs.model.config)),
        hooks=hooks,
    )


@contextmanager
def log_of_failure(config: Config, world: World) -> Iterator[None]:
    """Writes the log where the with-block fails for another reason than the user's input."""
    try:
        yield
    except UserError:
        raise
    except (Exception, KeyboardInterrupt):
        write_log(config, world)
        raise


def write_log(config: Config, world: World) -> None:
    """Writes, on rank 0, what was said of this run so far to its log, to which all that follows is appended."""
    if world.is_main:
        open_log(Path(str(config.train.run_dir)) / LOG)


def _passes(config: Config, inputs: Inputs, start: Start) -> tuple[bool, ...]:
    """Returns the passes that the policy will run: with gradients (True), and without (False) where a run has any."""
    fills = start.checkpoint is None and config.loss.facts.uses_reference
    return (True, False) if fills or len(inputs.data.eval) else (True,)


def _reference_loader(config: Config, world: World, inputs: Inputs, policy: Policy, packer: Packer) -> Any:
    """Returns a function that loads the reference at its first call, and returns the same model at later calls.

    Where policy and reference have the same weights, adapters aside, it returns the policy, which must not have been
    updated yet.
    """
    source = inputs.reference

    @functools.cache
    def load() -> Policy:
        if source.base == inputs.model.base:
            return policy
        return load_and_warm(config, world, source, packer, (False,))

    return load


@contextmanager
def _as_reference(policy: Policy, reference: SourceModel) -> Iterator[None]:
    """Has a policy that was just loaded compute as its reference inside, where both have the same base; after that it
    is at its start. Every rank must get here, or the rest hang.
    """
    if reference.adapters and reference.adapters.rank:
        read_start(policy)
        yield
        return
    with adapters_off(policy.model) if policy.adapters else nullcontext():
        yield
    read_start(policy)


def _cache(config: Config, inputs: Inputs, start: Start, world: World) -> RefCache:
    """Returns the cache of the reference, which is filled only where there is room for the run's files too.

    Every rank must get here, or the rest hang.
    """
    cache = open_cache(config, inputs.reference.hash, world)
    return replace(cache, beside=partial(least_beside, cache.root, config, start, inputs))


def _peak_flops(config: Config, policy: Policy, world: World) -> float | None:
    """Returns the peak FLOPs per second of all ranks together; None where any device is unknown.

    Every rank must get here, or the rest hang.
    """
    peaks = all_gather(peak_flops(world.device, compute_dtype(config.parallel, policy.dtype, world.device)))
    known = [peak for peak in peaks if peak]
    return sum(known) if len(known) == world.size else None
