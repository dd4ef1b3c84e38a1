"""Runs a model with adapters as its base alone."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Has the layers of a model compute without their adapters inside; weights and what is trained stay as they are.

    Not by peft's `enable_adapters`, which would also freeze the adapters' parameters, sharded by then.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
