"""The dtype of an exported model: by default that of the model from which the policy started."""

import json
from pathlib import Path

import torch

from dpo.base.errors import UserError
from dpo.config import CheckpointConfig
from dpo.hub.files import CONFIG_FILE
from dpo.model.matching import FLOATS
from dpo.model.weights import tensor_files

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""torch's names of the dtypes in FLOATS."""


def export_dtype(config: CheckpointConfig, base: Path) -> torch.dtype:
    """Returns the dtype of an exported model's weights, float32 or bfloat16.

    Where `export_dtype` is auto, it is the dtype of the base; float32 where the base has float16, whose range the
    trained weights may exceed, or float64.

    Args:
        config: gives `export_dtype`.
        base: the folder of the model from which the policy started; its weights need not be there.
    """
    name = base_dtype(base) if config.export_dtype == "auto" else config.export_dtype
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def adapters_dtype(config: CheckpointConfig) -> torch.dtype:
    """Returns the dtype of exported adapters: float32 unless `export_dtype` is bfloat16; they are small."""
    return torch.bfloat16 if config.export_dtype == "bfloat16" else torch.float32


def base_dtype(folder: Path) -> str | None:
    """Returns torch's name of the dtype in which the weights of a model folder are stored.

    Where they have several dtypes, or are not there, returns the dtype that `from_pretrained(dtype="auto")` loads: that
    of config.json, else that of the first floating-point tensor; None where neither is known.
    """
    stored = _stored_dtypes(folder)
    if len(set(stored)) == 1:
        return stored[0]
    return _config_dtype(folder) or next(iter(stored), None)


def _stored_dtypes(folder: Path) -> list[str]:
    """Returns the dtypes of a folder's floating-point tensors in the order of its files; none for a broken file."""
    try:
        return [_NAMES[tensor.dtype] for tensor in tensor_files(folder).values() if tensor.dtype in FLOATS]
    except UserError:
        return []


def _config_dtype(folder: Path) -> str | None:
    path = folder / CONFIG_FILE
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = settings.get("dtype") or settings.get("torch_dtype")
    return str(name).removeprefix("torch.") if name else None
