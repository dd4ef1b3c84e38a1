"""One update of the weights, on one screen.

batches -> pi_logps -> losses -> backward -> one exchange: metrics, gradient norm, stop request -> clip -> update
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo.base.errors import RunError
from dpo.batch.packing import PackedBatch
from dpo.config import Config
from dpo.distributed.preemption import StopRequest
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.step.metrics import SUMS, StepMetrics
from dpo.step.objective import pair_losses
from dpo.step.optim import clip_gradient, set_lr, square_norm
from dpo.watch.beats import stand


@dataclass(frozen=True)
class BatchValues:
    """The values of a micro-batch on its device, kept until it is known that the step is finite."""

    pi_logps: Tensor
    """(B,) nats."""
    losses: Tensor
    """(T,)"""


@dataclass(frozen=True)
class StepResult:
    """The result of a step: the same on every rank, but for `values`."""

    sums: Mapping[str, float]
    """The sums over all ranks (`StepMetrics.reduce`), and `grad_norm`, the L2 norm before clipping."""
    values: tuple[BatchValues, ...]
    """Of this rank's micro-batches, in order."""

    @property
    def fault(self) -> str | None:
        """Returns which number is not finite, in words; None where all are, and the weights were updated."""
        names = {"square_norm": "gradient", "losses": "loss"}  # a gradient first: it makes the weights
        bad = [name for name in (*names, *SUMS) if not math.isfinite(self.sums[name])]
        return f"the {names.get(bad[0], f'sum of {bad[0]}')} is not finite" if bad else None


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    config: Config,
    lr: float,
    stop_requested: StopRequest,
) -> StepResult:
    """Updates the weights once; the gradient is that of the mean loss over all pairs of the step, on any layout.

    Where any number of the step is not finite (`StepResult.fault`), weights and optimizer stay as they are, on every
    rank, and the gradient is dropped. Every rank must get here, or the rest hang.

    Args:
        policy: the sharded model; its parameters must have no gradient yet.
        optimizer: of the policy's parameters; its learning rate is set to `lr`.
        batches: this lane's micro-batches, at least one, in host memory; every lane must have the same number of them,
            or the ranks hang.
        config: gives the loss and the maximum norm of the gradient.
        lr: the learning rate of this update.
        stop_requested: called once; whether this rank was asked to stop.
    """
    set_lr(optimizer, lr)
    metrics, values = StepMetrics(policy.device), list[BatchValues]()
    for number, batch in enumerate((batch.to(policy.device) for batch in batches), start=1):
        stand("the forward pass", micro_batch=number)
        announce_backward(policy, is_last=number == len(batches))
        pi_logps = completion_logps(policy, batch)  # (B,)
        losses, rewards = pair_losses(pi_logps, batch, config.loss)  # (T,), (B,)
        stand("the backward pass", micro_batch=number)
        (losses.sum() / batch.pairs_in_step).backward()  # FSDP sums over ranks
        metrics.add(losses, rewards, pi_logps, batch)
        values.append(BatchValues(pi_logps.detach(), losses.detach()))
    stand("the update")
    # The only exchange of the step, and the only time that the host waits for the device. No rank may update before
    # all know that the gradient is finite. The update is enqueued, and the next step's kernels behind it.
    sums = metrics.reduce(square_norm(policy.model.parameters()), stop_requested())
    grad_norm = math.sqrt(sums["square_norm"])
    result = StepResult(sums | {"grad_norm": grad_norm}, tuple(values))
    if result.fault is None:
        clip_gradient(policy.model.parameters(), grad_norm, config.optim.max_grad_norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def require_finite(result: StepResult) -> None:
    """Raises RunError, on every rank, where a number of the step is not finite."""
    if result.fault:
        raise RunError(f"{result.fault}; the weights were not updated")
