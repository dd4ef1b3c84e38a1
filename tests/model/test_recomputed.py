"""What the backward pass computes again under each kind of activation checkpointing, compiled and not, counted."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.distributed.startup import open_world
from dpo.distributed.world import World
from dpo.model.policy import announce_backward, completion_logps
from tests.gpu.emulation import emulated
from tests.gpu.test_step import random_batches
from tests.model.test_policy import batches_of, load
from tests.support.models import save_model

LAYERS, PRODUCTS = 2, 7
"""Of `save_model`'s Llama: queries, keys, values, output, gate, up and down in each layer."""


class Counts(TorchDispatchMode):
    """Counts the matrix products and attention calls that run, op by op and in graphs, by pass."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.ran = {"forward": Counter[str](), "backward": Counter[str]()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an op and counts it."""
        self.ran[self.phase].update(kinds_of([str(func)]))
        return func(*args, **(kwargs or {}))

    def compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The graph as it is, which counts its ops each time that it runs."""
        kinds = kinds_of([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        run = make_boxed_func(graph.forward)

        def counted(args: list[Any]) -> Any:
            self.ran[self.phase].update(kinds)
            return run(args)

        counted._boxed_call = True  # type: ignore[attr-defined]
        return counted


def kinds_of(names: Sequence[str]) -> list[str]:
    """products or attention for each op that is one; attention's backward is none."""
    products = [name for name in names if name in ("aten.mm.default", "aten.addmm.default")]
    attention = [name for name in names if "attention" in name and "backward" not in name]
    return ["products"] * len(products) + ["attention"] * len(attention)


@contextmanager
def compiled_layers(counts: Counts) -> Iterator[None]:
    """The way of CUDA; layers are compiled but for inductor, which decides nothing that is counted here."""
    compile_module = nn.Module.compile
    backend = aot_autograd(
        fw_compiler=counts.compile, bw_compiler=counts.compile, partition_fn=min_cut_rematerialization_partition
    )
    with emulated(), patch("torch.nn.Module.compile", lambda module, options: compile_module(module, backend=backend)):
        yield


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


def counted(world: World, folder: Path, kind: str, is_compiled: bool) -> dict[str, Counter[str]]:
    """What forward and backward pass of one micro-batch run."""
    counts = Counts()
    with ExitStack() as stack:
        stack.enter_context(compiled_layers(counts) if is_compiled else counts)
        policy = load(world, folder, activation_checkpointing=kind, compile=is_compiled)
        counts.ran["forward"].clear()
        batch = random_batches(policy, 2, 640)[0] if is_compiled else batches_of(policy)[0][0]
        announce_backward(policy, is_last=True)
        loss = completion_logps(policy, batch.to(policy.device)).sum()
        counts.phase = "backward"
        loss.backward()
        assert sum(policy.graphs.values()) == is_compiled, "layers of one kind share their graph"
    torch.compiler.reset()
    return counts.ran


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_is_computed_again(is_compiled: bool, world: World, tmp_path: Path) -> None:
    """selective keeps attention and every second product of a layer, the first, third, fifth and seventh; full keeps
    none, and ends before the last product, whose result no gradient asks for. The head's products are the same in each.
    """
    torch.compiler.reset()
    folder = save_model(tmp_path, "llama")
    kept = counted(world, folder, "none", is_compiled)
    assert kept["backward"]["attention"] == 0
    assert kept["forward"]["attention"] >= LAYERS and kept["forward"]["products"] >= LAYERS * PRODUCTS
    for kind, products, attention in (("selective", 3, 0), ("full", 6, 1)):
        again = counted(world, folder, kind, is_compiled)
        assert again["forward"] == kept["forward"]
        assert again["backward"]["products"] - kept["backward"]["products"] == LAYERS * products, kind
        assert again["backward"]["attention"] == attention * kept["forward"]["attention"], kind
