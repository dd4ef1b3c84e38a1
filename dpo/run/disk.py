"""The bytes of a run's checkpoints and of its exported model."""

import math
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from dpo.config import Config
from dpo.model.build import build_on_meta
from dpo.step.optim import optimizer_elements


@dataclass(frozen=True)
class Sizes:
    """The bytes that a run of a model keeps in memory and on disk."""

    num_parameters: int
    state: int
    """Bytes of weights, gradients and optimizer of one copy of the model, on all its ranks together."""
    checkpoint: int
    """Bytes of one checkpoint: weights and optimizer."""
    final: int
    """Bytes of the exported model."""
    keep: int | None
    """Checkpoints that are kept; None: all."""
    num_saves: int | None
    """Checkpoints that the run writes; None where it depends on the number of pairs."""

    def disk_bytes(self, present: int) -> int:
        """Returns the bytes that the run still writes where `present` checkpoints exist already.

        They are the checkpoints that are kept and, besides, either the checkpoint that is written before the oldest is
        removed or the exported model. Where all of an unknown number are kept, one checkpoint and the model are
        counted.
        """
        bounds = [number for number in (self.keep, self.num_saves) if number is not None]
        kept = min(bounds, default=1)
        is_replaced = self.keep is not None and (self.num_saves is None or self.num_saves > self.keep)
        last = max(self.checkpoint, self.final) if is_replaced else self.final
        return max(kept - present, 0) * self.checkpoint + last


def sizes_of(config: Config, model_config: PretrainedConfig, last_step: int | None = None) -> Sizes:
    """Returns the sizes of a run of this model.

    Args:
        config: the run's.
        model_config: the transformers config of the model.
        last_step: the number of steps of the whole run; None where the pairs were not read.

    Raises:
        UserError: the model cannot be trained.
    """
    dtype, export_dtype = getattr(torch, config.model.dtype), getattr(torch, config.checkpoint.export_dtype)
    model = build_on_meta(model_config, dtype, config.model.trust_remote_code)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    elements = 1 + optimizer_elements(config.optim)
    return Sizes(
        num_parameters,
        num_parameters * dtype.itemsize * (1 + elements),
        num_parameters * dtype.itemsize * elements,
        num_parameters * export_dtype.itemsize,
        config.checkpoint.keep,
        num_saves(config, last_step),
    )


def num_saves(config: Config, last_step: int | None = None) -> int | None:
    """Returns the number of checkpoints that a run writes; None where it depends on the number of pairs.

    Args:
        config: the run's.
        last_step: the number of steps of the whole run; None where the pairs were not read.
    """
    every, steps = config.checkpoint.save_every, last_step or config.train.steps
    if every is None:
        return 1
    return None if steps is None else math.ceil(steps / every)
