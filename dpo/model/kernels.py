"""Compiles layers, counts their graphs, and keeps their kernels between starts.

Kernels are kept in `$DPO_CACHE/kernels`, or `~/.cache/dpo/kernels`, unless TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR
name other folders. The name of a file is a hash of its source, hardware and versions included. A file is written under
another name and renamed, so that the ranks of several jobs and nodes can share the folder. inductor takes locks there:
on a file system without locks, as some NFS, kernels are kept in torch's default folder on the node.
"""

import fcntl
import logging
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir as torch_folder

from dpo.base.files import default_cache_dir
from dpo.terminal.console import warn

Graphs = Counter[tuple[str, bool]]
"""(kind of layer, whether with gradients) -> the number of graphs compiled so far."""

RECOMPILE_LIMIT = 64
"""The maximum number of graphs of a function, above which torch.compile runs it uncompiled; torch's default is 8. All
layers of a class share one function. Two windows, a reference of another size, and passes with and without gradients
need up to 12."""

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variable of torch or Triton -> subfolder of the folder of kernels.

https://docs.pytorch.org/tutorials/recipes/torch_compile_caching_configuration_tutorial.html
"""


def keep_kernels(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the environment variables of the folders of kernels, except those that the user has set.

    Call it before anything is compiled. Where the folder cannot be written to or locked, torch's default folder (in
    /tmp) is used, and the first rank of the node warns.
    """
    folder = default_cache_dir() / "kernels"
    own = {variable: str(folder / name) for variable, name in VARIABLES.items() if _is_open(variable, environment)}
    try:
        for path in own.values():
            _try_folder(Path(path))
    except OSError as failure:
        kept = kernel_folder(environment)
        own = {"TORCHINDUCTOR_CACHE_DIR": kept, "TRITON_CACHE_DIR": f"{kept}/triton"}
        if environment.get("LOCAL_RANK", "0") == "0":
            what = f"compiled kernels are kept in {kept}, not in {folder}: {failure}"
            warn(f"{socket.gethostname()}: {what}; set DPO_CACHE to another folder")
    for variable, path in own.items():
        if _is_open(variable, environment):
            environment[variable] = path


def _is_open(variable: str, environment: Mapping[str, str]) -> bool:
    """Returns whether a variable's folder is still to be chosen: it is not set, or inductor's import set it to torch's
    default. Where `keep_kernels` chose torch's default, it set Triton's variable as well.
    """
    value = environment.get(variable)
    return value is None or (value == torch_folder() and environment.get("TRITON_CACHE_DIR") != f"{value}/triton")


def _try_folder(folder: Path) -> None:
    """Makes a folder, and locks a file in it as inductor does. Raises OSError where this fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def kernel_folder(environment: Mapping[str, str] = os.environ) -> str:
    """Returns the folder in which inductor keeps compiled kernels."""
    return environment.get("TORCHINDUCTOR_CACHE_DIR", torch_folder())


def num_graphs() -> int:
    """Returns the number of graphs that torch.compile has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def compile_layers(layers: Sequence[nn.Module], **how: Any) -> Graphs:
    """Wraps each layer in torch.compile, which compiles at the first call.

    Args:
        layers: the layers, modified in place.
        how: arguments of torch.compile that replace the trainer's own.

    Returns:
        The counter of the layers' graphs, which goes on counting while the layers run.
    """
    graphs: Graphs = Counter()
    # Hides torch's warning about in-place operations in checkpointed layers; tests compare the gradients.
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_not_in_place_warning)
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)  # for the whole process
    for layer in layers:
        layer.compile(**(how or {"options": _inductor_options()}))
        assert layer._compiled_call_impl is not None
        layer._compiled_call_impl = _counted(layer._compiled_call_impl, kind_of(layer), graphs)
    return graphs


def _inductor_options() -> dict[str, Any]:
    """Returns inductor's options that differ from its defaults. Mix-order reduction, a fusion of norms, is off: it
    guards on lengths up to 8,191 tokens and would compile one more graph in the middle of a run.
    """
    wanted = {"triton.mix_order_reduction": False}
    known = torch._inductor.list_options()
    return {name: value for name, value in wanted.items() if name in known}


def _is_not_in_place_warning(record: logging.LogRecord) -> bool:
    """Returns whether a log record is shown: it is not torch's warning about in-place operations."""
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


def _counted(run: Callable[..., Any], kind: str, graphs: Graphs) -> Callable[..., Any]:
    """Returns `run` wrapped so that it adds the graphs that its calls compile to `graphs`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = num_graphs()
        output = run(*args, **kwargs)
        if num_graphs() > before:
            graphs[kind, torch.is_grad_enabled()] += num_graphs() - before
        return output

    return call


def kind_of(layer: nn.Module) -> str:
    """Returns the layer's class, and its attention window where it has one; layers of a kind share their graphs."""
    windows = {getattr(module, "sliding_window", None) for module in layer.modules()} - {None}
    return type(layer).__name__ + "".join(f", window {window}" for window in windows)


def describe_graphs(graphs: Mapping[tuple[str, bool], int]) -> str:
    """Returns the counts as one line: `LlamaDecoderLayer: 1 graph with gradients, 1 without`."""
    counts = []
    for kind in sorted({kind for kind, _ in graphs}):
        with_gradients, without = graphs.get((kind, True), 0), graphs.get((kind, False), 0)
        counts.append(f"{kind}: {with_gradients} graph{'s' * (with_gradients != 1)} with gradients, {without} without")
    return "; ".join(counts)
