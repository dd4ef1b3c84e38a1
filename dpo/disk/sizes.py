"""The bytes of a run's checkpoints and of its exported model, and the bytes that it needs on disk."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from dpo.adapters.choice import find_adapters
from dpo.adapters.inject import trained
from dpo.adapters.names import is_of_adapter
from dpo.adapters.quantized import quantized_layers
from dpo.base.units import shown_bytes
from dpo.checkpoint.export_dtype import export_dtype
from dpo.config import Config
from dpo.model.on_meta import model_of
from dpo.step.optim import optimizer_elements


@dataclass(frozen=True)
class Sizes:
    """The bytes that a run of a model keeps in memory and on disk."""

    num_parameters: int
    """Parameters of the model, adapters aside."""
    state: int
    """Bytes of weights, gradients and optimizer of one copy of the model, on all its ranks together."""
    checkpoint: int
    """Bytes of one checkpoint: trained weights and optimizer."""
    final: int
    """Bytes of the exported model, or of its adapters."""
    keep: int | None
    """Checkpoints that are kept; None: all."""
    num_saves: int | None
    """Checkpoints that the run writes; None where it depends on the number of pairs."""
    evaluations: int = 0
    """Bytes of the files of evaluations, see `dpo.run_folder.evaluations`."""
    records: int = 0
    """Bytes of metrics, charts and log."""
    copies_in_export: int = 2
    """Copies of `final` that the export has on disk at its peak: the shards of all ranks, and the files of the model,
    to which rank 0 joins them. 1 for adapters, which rank 0 writes at once.
    """

    @property
    def export(self) -> int:
        """Returns the bytes that the export has on disk at its peak."""
        return self.copies_in_export * self.final

    @property
    def is_replaced(self) -> bool:
        """Returns whether the run writes more checkpoints than it keeps: one more than these exists for a while."""
        return self.keep is not None and (self.num_saves is None or self.num_saves > self.keep)

    def num_new(self, present: int) -> int:
        """Returns how many more checkpoints will be kept than the `present` ones. Where all of an unknown number are
        kept, one checkpoint is counted.
        """
        bounds = [number for number in (self.keep, self.num_saves) if number is not None]
        return max(min(bounds, default=1) - present, 0)

    def disk_bytes(self, present: int) -> int:
        """Returns the bytes that the run still needs on disk where `present` checkpoints exist already.

        They are the checkpoints that will be kept, the files of evaluations, the metrics and, besides, the larger of
        the exported model, as it is written, and the checkpoint that is written before the oldest is removed.
        """
        last = max(self.checkpoint, self.export) if self.is_replaced else self.export
        return self.num_new(present) * self.checkpoint + self.evaluations + self.records + last

    def checkpoint_bytes(self, present: int) -> int:
        """Returns the bytes of `disk_bytes` in the folder of the checkpoints, where that is on a disk of its own."""
        return (self.num_new(present) + self.is_replaced) * self.checkpoint

    @property
    def other_bytes(self) -> int:
        """Returns the bytes of `disk_bytes` on the disk of the run folder, where the checkpoints are on another one."""
        return self.evaluations + self.records + self.export

    def least_bytes(self, present: int) -> int:
        """Returns the bytes without which the run cannot save a checkpoint and export the model."""
        return min(self.disk_bytes(present), self.checkpoint + self.export)


BYTES_PER_STEP = 2048
"""Bytes that a step adds to metrics.jsonl, TensorBoard's files and the log: 800, 600 and 13 in a run of 3,000 steps."""


def disk_words(sizes: Sizes, present: int) -> str:
    """Returns the parts of `Sizes.disk_bytes` in words, with the key from which their number follows."""
    last = _export_words(sizes)
    if sizes.is_replaced and sizes.checkpoint >= sizes.export:
        last = f"{shown_bytes(sizes.checkpoint)} for a further one, written before the oldest is removed"
    records = f", {_records_words(sizes)}" if sizes.evaluations + sizes.records else ""
    return f"{_kept_words(sizes, present)}{records} and {last}"


def checkpoint_words(sizes: Sizes, present: int) -> str:
    """Returns the parts of `Sizes.checkpoint_bytes` in words."""
    further = " and a further one, written before the oldest is removed" if sizes.is_replaced else ""
    return f"{_kept_words(sizes, present)}{further}"


def other_words(sizes: Sizes) -> str:
    """Returns the parts of `Sizes.other_bytes` in words."""
    return f"{_records_words(sizes)} and {_export_words(sizes)}"


def _export_words(sizes: Sizes) -> str:
    return f"{shown_bytes(sizes.export)} for {export_words(sizes)}"


def export_words(sizes: Sizes) -> str:
    """Returns what the bytes of `Sizes.export` are."""
    return f"the export, {'the adapters alone' if sizes.copies_in_export == 1 else 'twice the exported model'}"


def _records_words(sizes: Sizes) -> str:
    return f"{shown_bytes(sizes.evaluations + sizes.records)} for metrics and the values of evaluated pairs"


def _kept_words(sizes: Sizes, present: int) -> str:
    keep = "null, which keeps all" if sizes.keep is None else sizes.keep
    there = f"; {present} there already" if present else ""
    number = sizes.num_new(present)
    each = shown_bytes(sizes.checkpoint)
    return f"{number} {'checkpoint' if number == 1 else 'checkpoints'} of {each} (checkpoint.keep {keep}{there})"


def sizes_of(config: Config, model_config: PretrainedConfig, last_step: int | None = None) -> Sizes:
    """Returns the sizes of a run of this model.

    Args:
        config: the run's.
        model_config: the transformers config of the model, which knows the folder that it was read from.
        last_step: the number of steps of the whole run; None where the pairs were not read.

    Raises:
        UserError: the model cannot be trained.
    """
    model = model_of(config, model_config)
    weights, updated = num_bytes(model.parameters()), num_bytes(trained(model.parameters()))
    of_adapters = sum(p.numel() for name, p in model.named_parameters() if is_of_adapter(name))
    of_model = num_parameters(model) - of_adapters
    kept = optimizer_elements(config.optim) * updated
    is_whole = find_adapters(config) is None
    exported = export_dtype(config.checkpoint, Path(model_config.name_or_path or "."))
    return Sizes(
        of_model,
        state=weights + updated + kept,
        checkpoint=updated + kept,
        final=of_model * exported.itemsize if is_whole else updated,
        keep=config.checkpoint.keep,
        num_saves=num_saves(config, last_step),
        copies_in_export=2 if is_whole else 1,
    )


def num_parameters(model: nn.Module) -> int:
    """Returns the number of parameters of the whole model, tied parameters once; a DTensor counts in full, and of a
    quantized weight its elements, not those of its bytes.
    """
    quantized = {id(layer.packed): layer.shape.numel() for layer in quantized_layers(model).values()}
    return sum(quantized.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Returns the bytes of whole parameters, sharded or not."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def saves_after(config: Config, step: int, last_step: int) -> int:
    """Returns the number of checkpoints that a run of `last_step` steps writes after `step` of them."""
    return _times_after(config.checkpoint.save_every, step, last_step)


def evaluations_after(config: Config, step: int, last_step: int) -> int:
    """Returns the number of evaluations that a run of `last_step` steps makes after `step` of them. That before the
    first step belongs to them.
    """
    before = 1 if step == 0 else 0
    return before + _times_after(config.train.eval_every, step, last_step)


def _times_after(every: int | None, step: int, last_step: int) -> int:
    """Returns how many multiples of `every` lie after `step`, up to `last_step`, which counts in any case."""
    if step >= last_step:
        return 0
    return 1 if every is None else -(-last_step // every) - step // every


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
