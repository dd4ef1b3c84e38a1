"""A step asks the device nothing before its one exchange: on CUDA the host would wait until all is computed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.config import LossConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World
from dpo.model.policy import announce_backward, completion_logps
from dpo.step.metrics import StepMetrics
from dpo.step.objective import pair_losses
from dpo.step.optim import make_optimizer
from dpo.step.update import train_step
from tests.model.test_policy import batches_of, load
from tests.support.models import FAMILIES, save_model
from tests.support.runs import changed, make_config

ASKING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
"""Operations whose result, or its shape, the host must know: `.item()`, `if tensor`, indices from a mask."""


class Asked(TorchDispatchMode):
    """Notes the operations that would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        indices = args[1] if name.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1 else ()
        if name in ASKING or any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices if i is not None):
            self.names.append(name)
        return func(*args, **kwargs or {})

    def noting(self, name: str) -> Callable[..., Any]:
        """A method of tensors that notes each call; these go past the dispatcher."""
        original = getattr(Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return original(*args, **kwargs)

        return call


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Also what goes past the dispatcher: tensors that become lists or arrays."""
    with Asked() as mode:
        for name in ("tolist", "numpy", "__array__"):
            monkeypatch.setattr(Tensor, name, mode.noting(name))
        yield mode
        monkeypatch.undo()


def test_questions_are_noted(asked: Asked) -> None:
    tensor = torch.arange(3)
    tensor[0].item()
    if tensor[1] > 0:
        tensor[tensor > 1]
    tensor.tolist()
    assert asked.names == ["_local_scalar_dense", "_local_scalar_dense", "index", "tolist"]


CHUNKED, WHOLE = 1000, 2**20
"""Bytes of the head's logits: far too few for all of them at once, and enough."""
PLAIN, FULL = LossConfig(), LossConfig("robust", label_smoothing=0.1, length_normalized=True)


@pytest.mark.parametrize(
    ("family", "head_bytes", "loss"),
    [
        *((family, CHUNKED, FULL) for family in FAMILIES),
        *((family, WHOLE, PLAIN) for family in ("llama", "gpt2")),
    ],
)
def test_micro_batches_ask_nothing(
    family: str, head_bytes: int, loss: LossConfig, world: World, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Forward, loss, backward and metrics of two micro-batches, with full logits and with the chunked head."""
    policy = load(world, save_model(tmp_path, family), activation_checkpointing="selective")
    policy = replace(policy, head_bytes=head_bytes)
    batches = [batch for batch, _ in batches_of(policy, budget=1)]
    metrics = StepMetrics(policy.device)
    mode = request.getfixturevalue("asked")
    for number, batch in enumerate(batches, start=1):
        announce_backward(policy, number == len(batches))
        pi_logps = completion_logps(policy, batch)
        losses, rewards = pair_losses(pi_logps, batch, loss)
        (losses.sum() / batch.pairs_in_step).backward()
        metrics.add(losses, rewards, pi_logps, batch)
    assert mode.names == []


def test_a_step_asks_nothing_but_its_exchange(world: World, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What is kept of the micro-batches is not looked at where the step is finite."""
    policy = load(world, save_model(tmp_path, "llama"))
    batches = [batch for batch, _ in batches_of(policy, budget=1)]
    config = changed(make_config(tmp_path, "pairs.jsonl", tmp_path / "run"), optim__name="sgd")
    optimizer = make_optimizer(policy.model.parameters(), config.optim)
    train_step(policy, optimizer, batches, config, 1e-3, lambda: False)
    mode = request.getfixturevalue("asked")
    result = train_step(policy, optimizer, batches, config, 1e-3, lambda: False)
    step, mode.names = mode.names, []
    StepMetrics(policy.device).reduce(torch.zeros(()))
    assert step == mode.names != []
    assert result.fault is None and len(result.values) == len(batches)
