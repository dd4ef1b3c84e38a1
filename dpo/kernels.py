"""Compiled layers: how many graphs they take, and where their kernels are kept between starts.

Kernels lie in `$DPO_CACHE/kernels`, or `~/.cache/dpo/kernels`, unless TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR name
other folders. Files there are named by what they were made of, hardware and versions included, and are written under
another name and renamed, so that the ranks of several jobs and nodes may share them.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._inductor
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir as torch_cache_dir

from dpo.cache import default_cache_dir
from dpo.progress import warn

Graphs = Counter[tuple[str, bool]]
"""(kind of layer, whether with gradients) -> graphs compiled so far."""

RECOMPILE_LIMIT = 64
"""Graphs a piece of code, above torch's 8, behind which it would run uncompiled: all layers of a class count together,
and 2 windows, a reference of another size and passes with and without gradients take up to 12."""

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variable of torch or Triton -> folder in that of the kernels.

https://docs.pytorch.org/tutorials/recipes/torch_compile_caching_configuration_tutorial.html
"""


def keep_kernels(environment: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Sets the folders of compiled kernels, before anything is compiled; what the user has set stays.

    Where the folder cannot be written to, torch's own stay (in /tmp), and a warning says so.
    """
    folder = default_cache_dir() / "kernels"
    try:
        for name in VARIABLES.values():
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        warn(f"compiled kernels are kept in /tmp, not in {folder}: {failure}; DPO_CACHE names another folder")
        return
    for variable, name in VARIABLES.items():
        # torch sets its own folder in /tmp when its compiler is imported.
        if environment.get(variable) in (None, torch_cache_dir()):
            environment[variable] = str(folder / name)


def num_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(counters["stats"]["unique_graphs"])


def compile_layers(layers: Sequence[nn.Module]) -> Graphs:
    """Has each layer compiled when it is called: for the length of the first row, then, at the second length, for any.
    Gives the count that is kept from now on.
    """
    graphs: Graphs = Counter()
    # It asks whether a checkpointed layer works in place, which the exactness tests answer.
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_new_to_users)
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)  # of the whole process
    for layer in layers:
        layer.compile(options=_inductor_options())
        assert layer._compiled_call_impl is not None
        layer._compiled_call_impl = _counted(layer._compiled_call_impl, kind_of(layer), graphs)
    return graphs


def _inductor_options() -> dict[str, Any]:
    """Mix-order reduction, a fusion of norms, guards the length at 8,191 tokens: one graph more in the middle of a run,
    for which all ranks wait.
    """
    wanted = {"triton.mix_order_reduction": False}
    known = torch._inductor.list_options()
    return {name: value for name, value in wanted.items() if name in known}


def _is_new_to_users(record: logging.LogRecord) -> bool:
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


def _counted(run: Callable[..., Any], kind: str, graphs: Graphs) -> Callable[..., Any]:
    """`run`, which adds the graphs that its calls compile to `graphs`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = num_graphs()
        output = run(*args, **kwargs)
        if num_graphs() > before:
            graphs[kind, torch.is_grad_enabled()] += num_graphs() - before
        return output

    return call


def kind_of(layer: nn.Module) -> str:
    """The layer's class, and its attention window where it has one: layers of one kind share their graphs."""
    windows = {getattr(module, "sliding_window", None) for module in layer.modules()} - {None}
    return type(layer).__name__ + "".join(f", window {window}" for window in windows)


def describe_graphs(graphs: Mapping[tuple[str, bool], int]) -> str:
    """The counts as one line: `LlamaDecoderLayer: 1 graph with gradients, 1 without`."""
    lines = []
    for kind in sorted({kind for kind, _ in graphs}):
        with_gradients, without = graphs.get((kind, True), 0), graphs.get((kind, False), 0)
        lines.append(f"{kind}: {with_gradients} graph{'s' * (with_gradients != 1)} with gradients, {without} without")
    return "; ".join(lines)
