"""One update of the weights, on one screen.

batches -> pi_logps -> losses -> backward -> one exchange: metrics, gradient norm, stop request -> clip -> update
"""

import math
from collections.abc import Sequence

import torch

from dpo.base.errors import RunError
from dpo.batch.packing import PackedBatch
from dpo.config import Config
from dpo.distributed.preemption import StopRequest
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.step.metrics import StepMetrics
from dpo.step.objective import pair_losses
from dpo.step.optim import clip_gradient, set_lr, square_norm


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    config: Config,
    lr: float,
    stop_requested: StopRequest,
) -> dict[str, float]:
    """Updates the weights once; the gradient is that of the mean loss over all pairs of the step, on any layout.

    Every rank must get here, or the rest hang.

    Args:
        policy: the sharded model; its parameters must have no gradient yet.
        optimizer: of the policy's parameters; its learning rate is set to `lr`.
        batches: this lane's micro-batches, at least one, in host memory; every lane must have the same number of them,
            or the ranks hang.
        config: gives the loss and the maximum norm of the gradient.
        lr: the learning rate of this update.
        stop_requested: called once; whether this rank was asked to stop.

    Returns:
        The step's sums over all ranks (`StepMetrics.reduce`), and `grad_norm`, the L2 norm before clipping.

    Raises:
        RunError: on every rank, before the update, where the gradient is not finite.
    """
    set_lr(optimizer, lr)
    metrics = StepMetrics(policy.device)
    for number, batch in enumerate((batch.to(policy.device) for batch in batches), start=1):
        announce_backward(policy, is_last=number == len(batches))
        pi_logps = completion_logps(policy, batch)  # (B,)
        losses, rewards = pair_losses(pi_logps, batch, config.loss)  # (T,), (B,)
        (losses.sum() / batch.pairs_in_step).backward()  # FSDP sums over ranks
        metrics.add(losses, rewards, pi_logps, batch)
    # The only exchange of the step, and the only time that the host waits for the device. No rank may update before
    # all know that the gradient is finite. The update is enqueued, and the next step's kernels behind it.
    sums = metrics.reduce(square_norm(policy.model.parameters()), stop_requested())
    grad_norm = math.sqrt(sums["square_norm"])
    if not math.isfinite(grad_norm):
        raise RunError(f"the gradient norm is {grad_norm}; the weights were not updated")
    clip_gradient(policy.model.parameters(), grad_norm, config.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums | {"grad_norm": grad_norm}
