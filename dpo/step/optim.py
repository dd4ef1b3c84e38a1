"""Optimizers, the learning rate as a function of the step, and the clipping of a sharded gradient."""

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from dpo.config import OptimConfig
from dpo.distributed.shards import local


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Returns the configured optimizer of (sharded) master weights; the loop sets its learning rate before each step.

    On CUDA, AdamW uses torch's fused kernel. RMSprop and SGD use torch's default there, the foreach implementation:
    RMSprop has no fused kernel, and SGD's does not support DTensor.
    """
    parameters = list(parameters)
    groups = [{"params": parameters, "lr": config.lr, "weight_decay": config.weight_decay}]
    match config.name:
        case "rmsprop":
            return torch.optim.RMSprop(groups, alpha=config.alpha, eps=config.eps, momentum=config.momentum)
        case "adamw":
            on_cuda = all(parameter.device.type == "cuda" for parameter in parameters)
            # None, not False: False would also disable the foreach implementation.
            return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=on_cuda or None)
        case "sgd":
            return torch.optim.SGD(groups, momentum=config.momentum)
        case _:
            assert_never(config.name)


def optimizer_elements(config: OptimConfig) -> int:
    """Returns the elements that the optimizer keeps per parameter, beside the parameter and its gradient."""
    return {"rmsprop": 1 + (config.momentum > 0), "adamw": 2, "sgd": int(config.momentum > 0)}[config.name]


def lr_at(step: int, last_step: int, config: OptimConfig) -> float:
    """Returns the learning rate of step s in 1 .. N = last_step, with W from `num_warmup_steps`:

    s <= W: lr s / (W + 1); then lr (m + (1 - m) f), with m = min_lr_ratio and f of the schedule:
    constant: 1; linear: min(1, (N + 1 - s) / (N + 1 - W)); cosine: (1 + cos(pi (s - W) / (N + 1 - W))) / 2.

    Args:
        step: the step s, from 1.
        last_step: N, the number of steps of the whole run, not of this start.
        config: gives `lr`, `warmup_steps`, `schedule` and `min_lr_ratio`.
    """
    warmup = num_warmup_steps(last_step, config)
    if step <= warmup:
        return config.lr * step / (warmup + 1)
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * _decay(step - warmup, last_step + 1 - warmup, config))


def num_warmup_steps(last_step: int, config: OptimConfig) -> int:
    """Returns W: `warmup_steps` where it is an integer, else this fraction of the run's steps, rounded up.

    The fraction is the decimal number that the user wrote: 0.07 of 100 steps are 7, although 0.07 * 100 > 7 in floating
    point.
    """
    warmup = config.warmup_steps
    return warmup if isinstance(warmup, int) else math.ceil(Fraction(str(warmup)) * last_step)


def _decay(step: int, span: int, config: OptimConfig) -> float:
    """Returns the factor of the schedule at `step` after the warm-up, which is 0 at `span`, just after the last."""
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return min(1.0, (span - step) / span)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / span))
        case _:
            assert_never(config.schedule)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def square_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns this rank's share of the squared L2 norm of the gradient, a float64 scalar on the device; nothing waits.

    The sum over all ranks is the squared norm. With HSDP each replica holds the whole gradient, so each rank divides by
    the number of replicas.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    square = get_total_norm([local(gradient) for gradient in gradients]).double().square()
    return square / _num_replicas(gradients)


def _num_replicas(gradients: Iterable[Tensor]) -> int:
    """Returns the number of ranks that hold the same shard of the gradient."""
    counts = {_replicas(gradient) for gradient in gradients}
    assert len(counts) <= 1, f"shards of the gradient on different numbers of ranks: {counts}"
    return max(counts, default=1)


def _replicas(tensor: Tensor) -> int:
    if not isinstance(tensor, DTensor):
        return 1
    mesh, placements = tensor.device_mesh, tensor.placements
    return math.prod(mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_replicate())


def clip_gradient(parameters: Iterable[nn.Parameter], norm: float, max_norm: float | None) -> None:
    """Scales the gradient so that its L2 norm is at most `max_norm`.

    `norm` is a number on the host, so the host does not wait for the device.

    Args:
        parameters: (sharded) parameters, whose gradients are scaled in place; those without a gradient are skipped.
        norm: the L2 norm of the whole gradient, over all ranks.
        max_norm: `optim.max_grad_norm`; None: no limit.
    """
    if max_norm is not None and norm > max_norm:
        torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], max_norm / norm)
