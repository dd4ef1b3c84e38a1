"""Optimizers, the learning rate as a function of the step, and the norm of a sharded gradient."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dpo.config import OptimConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer over (sharded) master weights; its learning rate is set at every step from `lr_at`."""
    groups = [{"params": list(parameters), "lr": config.lr, "weight_decay": config.weight_decay}]
    match config.name:
        case "rmsprop":
            return torch.optim.RMSprop(groups, alpha=config.alpha, eps=config.eps, momentum=config.momentum)
        case "adamw":
            return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
        case "sgd":
            return torch.optim.SGD(groups, momentum=config.momentum)
    raise ValueError(f"optim.name: {config.name!r} is no optimizer; valid: rmsprop, adamw, sgd")


def lr_at(step: int, last_step: int, config: OptimConfig) -> float:
    """The learning rate of a step s in 1 .. N = last_step, with W = warmup_steps:

    s <= W: lr s / (W + 1); then constant: lr; linear: lr min(1, (N + 1 - s) / (N + 1 - W));
    cosine: lr (1 + cos(pi (s - W) / (N + 1 - W))) / 2.
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * step / (warmup + 1)
    span = last_step + 1 - warmup
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * min(1.0, (last_step + 1 - step) / span)
        case "cosine":
            return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / span))
    raise ValueError(f"optim.schedule: {config.schedule!r} is no schedule; valid: constant, linear, cosine")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Makes the next step use this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradient(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """The L2 norm of the whole gradient before clipping, a scalar; scales the gradient down to `max_norm`, None is no
    limit.

    Every rank must get here: the norms of the shards are summed over ranks.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
