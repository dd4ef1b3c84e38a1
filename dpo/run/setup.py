"""From checked input to everything that a run needs: policy, reference log-probabilities, optimizer."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpo.base.errors import Preempted
from dpo.batch.packer import Packer, make_packer
from dpo.checkpoint.store import load_checkpoint
from dpo.config import Config
from dpo.distributed.collectives import all_gather
from dpo.distributed.preemption import StopRequest
from dpo.distributed.world import World
from dpo.machine.peaks import peak_flops
from dpo.model.parallelize import compute_dtype
from dpo.model.policy import Policy, free_memory, reshard
from dpo.model.warm_up import load_and_warm
from dpo.ref_logps.fill import ReferencePass, fill_cache, lookup
from dpo.run.answers import AnswerBook, prepare_answers
from dpo.run.folder import Start
from dpo.run.inputs import Inputs
from dpo.step.deviation import rounding_scale
from dpo.step.first_step import Terms
from dpo.step.objective import has_reference
from dpo.step.optim import make_optimizer


@dataclass(frozen=True)
class Run:
    """Everything of a run."""

    config: Config
    world: World
    inputs: Inputs
    start: Start
    identity: dict[str, Any]
    """What a checkpoint records so that only the same run goes on from it."""
    policy: Policy
    optimizer: torch.optim.Optimizer
    packer: Packer
    reference_pass: ReferencePass | None
    """None where the loss has no reference."""
    answers: AnswerBook | None
    """None where no sampled answers are asked for, or can be given."""
    peak_flops: float | None
    """FLOPs a second of all ranks at best; None where the device is not in the table of `costs.py`."""
    stop_requested: StopRequest

    @property
    def dir(self) -> Path:
        """The run folder."""
        return Path(str(self.config.train.run_dir))

    @property
    def head_bytes(self) -> int:
        """The most memory that the head's logits may take at a time, bytes."""
        return self.config.parallel.head_memory_mib * 2**20

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the forward and backward pass."""
        return compute_dtype(self.config.parallel, self.policy.dtype, self.world.device)

    @property
    def begins_at_reference(self) -> bool:
        """Whether the next step's policy is the reference: a fresh run from it. Its first step is then checked."""
        same = self.inputs.model.hash == self.inputs.reference.hash
        return self.start.step == 0 and self.reference_pass is not None and same

    @property
    def first_step_terms(self) -> Terms:
        """What the check of the first step holds this run to."""
        scale = rounding_scale(self.compute_dtype, self.config.parallel.tf32 and self.world.device.type == "cuda")
        otherwise = self.reference_pass.made_otherwise if self.reference_pass else None
        return Terms(scale, self.config.reference.first_step_check, otherwise)


def build_run(
    config: Config, world: World, inputs: Inputs, start: Start, identity: dict[str, Any], stop_requested: StopRequest
) -> Run:
    """A run at its beginning, or where its checkpoint ends. Raises Preempted where it is asked to stop while the
    reference is computed. Every rank must get here.
    """
    assert not config.parallel.undecided, config.parallel.undecided
    model, reference = inputs.model, inputs.reference
    packer, reference_pass = make_packer(config, world, model.config), None
    begins = start.checkpoint is None and has_reference(config.loss)
    passes = (True, False) if begins or len(inputs.data.eval) else (True,)
    policy = load_and_warm(config, world, model.config, model.folder, packer, passes)

    @functools.cache
    def reference_policy() -> Policy:
        if reference.hash == model.hash:
            return policy
        return load_and_warm(config, world, reference.config, reference.folder, packer, (False,))

    if has_reference(config.loss):
        sets = [inputs.data.train, inputs.data.eval]
        try:
            rows, reference_pass = fill_cache(
                config, world, reference.hash, sets, reference_policy, packer, stop_requested
            )
        except Preempted:
            raise Preempted(start.step) from None
        packer = replace(packer, ref_logps=lookup(rows))
    answers = prepare_answers(config, world, inputs, reference_policy)
    reference_policy.cache_clear()
    free_memory()
    reshard(policy)
    optimizer = make_optimizer(policy.model.parameters(), config.optim)
    if start.checkpoint:
        load_checkpoint(start.checkpoint, policy.model, optimizer)
    peaks = all_gather(peak_flops(world.device, compute_dtype(config.parallel, policy.dtype, world.device)))
    return Run(
        config,
        world,
        inputs,
        start,
        identity,
        policy,
        optimizer,
        packer,
        reference_pass,
        answers,
        sum(known) if len(known := [peak for peak in peaks if peak]) == world.size else None,
        stop_requested,
    )
