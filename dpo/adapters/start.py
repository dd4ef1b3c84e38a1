"""The values with which adapters start: at random without effect, or from a file; the same on any layout of ranks.

A of an adapter is uniform in [-1/sqrt(n), 1/sqrt(n)], n its inputs, as peft starts it; its numbers are a function of
(seed, name). B is 0, so that the product is. A DoRA magnitude is the norm of the weights of an output.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.adapters.names import file_name, is_of_adapter, plain_name
from dpo.adapters.quantized import stored_hash
from dpo.adapters.reading import opened
from dpo.adapters.spec import AdapterSpec
from dpo.base.errors import UserError
from dpo.distributed.collectives import together
from dpo.distributed.shards import local, own_rows, whole
from dpo.hub.files import ADAPTER_TENSORS

OF_THIS_BASE = "adapters that were trained for the model in model.path"
"""What would be right in place of a file that does not fit."""


def start_adapters(model: nn.Module, seed: int) -> None:
    """Fills all adapters of a model whose other weights are loaded, so that they change nothing: A at random, B with 0,
    magnitudes with norms. Every rank must get here, or the rest hang.

    Args:
        model: the sharded model.
        seed: of the random numbers.
    """
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not is_of_adapter(name):
                continue
            if ".lora_A." in name:
                _fill(parameter, uniform(file_name(name), parameter.shape, seed))
            elif ".lora_B." in name:
                local(parameter).zero_()
            else:
                layer = name.partition(".lora_magnitude_vector.")[0]
                _start_magnitude(parameter, modules[layer])
                together(partial(_check_magnitude, layer, local(parameter)))


def uniform(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Returns the start of A, float64, a function of (seed, name): uniform in [-1/sqrt(n), 1/sqrt(n)], n = shape[1]."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)


def _start_magnitude(magnitude: Tensor, layer: Any) -> None:
    """Fills the magnitudes, (outputs,), of an adapted layer with the L2 norms of the weights of each output. Every rank
    must get here, or the rest hang.
    """
    weight = layer.get_base_layer().weight.detach()
    if layer.fan_in_fan_out:  # a Conv1D's weight is (inputs, outputs): each rank holds some inputs of every output
        _fill(magnitude, _norms(whole(weight).T))
    else:
        local(magnitude).copy_(_norms(local(weight)))


def _check_magnitude(layer: str, magnitude: Tensor) -> None:
    """Raises UserError where an output has only weights of 0: DoRA divides by their norm."""
    if bool((magnitude == 0).any()):
        what = f"an output of {layer} has only weights of 0, and DoRA divides by their norm"
        raise UserError("lora.dora", what, "false, or the layer in lora.exclude_modules")


def _norms(weight: Tensor) -> Tensor:
    """Returns the L2 norms of rows, in float32 at least."""
    norms: Tensor = torch.linalg.norm(weight.to(torch.promote_types(weight.dtype, torch.float32)), dim=1)
    return norms


def _fill(parameter: Tensor, values: Tensor) -> None:
    """Copies this rank's rows of a whole tensor."""
    local(parameter).copy_(values[own_rows(parameter)])


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the trained parameters of a model by their names in a file of adapters. A tied one has both its names:
    peft trains and stores head and embedding apart, and computes as this model does where both are in the file.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {file_name(name): parameter for name, parameter in named if parameter.requires_grad}


def read_adapters(model: nn.Module, folder: Path) -> None:
    """Fills the trained parameters of a model from a folder of adapters; each rank reads its own rows. Every rank must
    get here, or the rest hang.

    Raises:
        UserError: on every rank, where the file lacks a tensor, has one too many, or one of another shape.
    """
    tensors = trained_tensors(model)
    together(lambda: _read(folder / ADAPTER_TENSORS, tensors))


def check_adapters(model: nn.Module, folder: Path) -> None:
    """Raises what `read_adapters` raises where the tensors of a folder are not those of a model's adapters; reads their
    names and shapes alone. Every rank must get here, or the rest hang.
    """
    tensors = trained_tensors(model)
    together(lambda: _check_file(folder / ADAPTER_TENSORS, tensors))


def _check_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with opened(path) as file:
        _slices(path, file, tensors)


def _read(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills this rank's rows of tensors from a file.

    Args:
        path: a safetensors file.
        tensors: by name; a tied one under each of its names, of which the file may have one or all.

    Raises:
        UserError: the file is not readable, or has other tensors.
    """
    with opened(path) as file, torch.no_grad():
        stored, filled = _slices(path, file, tensors), dict[Tensor, str]()
        for name in sorted(stored):
            own = stored[name][own_rows(tensors[name])].to(tensors[name].dtype)
            first = filled.setdefault(tensors[name], name)
            if first == name:
                local(tensors[name]).copy_(own)
            elif not torch.equal(local(tensors[name]), own):
                raise UserError(str(path), f"{name} differs from {first}, which the model ties to it")


def _slices(path: Path, file: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the slices of a file's tensors by name. Raises UserError where they are not those of the adapters."""
    stored = {plain_name(name): file.get_slice(name) for name in file.keys()}
    _check(path, {name: tuple(part.get_shape()) for name, part in stored.items()}, tensors)
    return stored


def _check(path: Path, stored: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError where the tensors of a file are not those of a model's adapters."""
    found = {tensors[name] for name in set(tensors) & set(stored)}
    missing = sorted(name for name, tensor in tensors.items() if tensor not in found)
    extra = sorted(set(stored) - set(tensors))
    if missing:
        what = f"{len(missing)} tensors of the adapters are missing, the first is {missing[0]}"
        raise UserError(str(path), what, OF_THIS_BASE)
    if extra:
        what = f"{len(extra)} tensors fit no adapter of the model, the first is {extra[0]}"
        raise UserError(str(path), what, OF_THIS_BASE)
    for name, shape in stored.items():
        if tuple(tensors[name].shape) != shape:
            what = f"{name} has shape {shape} where the model wants {tuple(tensors[name].shape)}"
            raise UserError(str(path), what, OF_THIS_BASE)


# --- content ---------------------------------------------------------------------------------------------------------


def start_hash(base_hash: str, spec: AdapterSpec) -> str:
    """Returns the hash of a model with the adapters of a folder; that of its base where they do not change it: where
    there is no folder, or every B is 0, without magnitudes and modules that are trained whole.

    Args:
        base_hash: the hash of the model without adapters, in its folder.
        spec: the adapters.

    Raises:
        UserError: the file of the adapters cannot be read.
    """
    base_hash = stored_hash(base_hash, spec)
    if spec.folder is None:
        return base_hash
    with opened(spec.folder / ADAPTER_TENSORS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if all(".lora_" in name and (".lora_A" in name or not t.any()) for name, t in tensors.items()):
        return base_hash
    content = hashlib.sha256(f"{base_hash} {json.dumps(_factors(spec), sort_keys=True)}".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def _factors(spec: AdapterSpec) -> dict[str, Any]:
    """Returns what decides the effect of adapters beside their tensors, whose names tell the layers."""
    return {
        "rank": spec.rank,
        "alpha": float(spec.alpha),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {name: float(alpha) for name, alpha in spec.alpha_pattern.items()},
        "rslora": spec.rslora,
        "dora": spec.dora,
    }
