"""Writes trained adapters as a folder in peft's form, which `PeftModel.from_pretrained` and transformers load."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo.adapters.reading import ADAPTER_CONFIG
from dpo.adapters.spec import ADAPTER
from dpo.adapters.start import TENSORS, trained_tensors
from dpo.base.files import write_file
from dpo.distributed.collectives import on_main
from dpo.distributed.world import World
from dpo.model.policy import Policy
from dpo.watch.failures import storage_errors


def save_adapters(folder: Path, policy: Policy, world: World) -> None:
    """Writes what is trained, in the dtype of the master weights. Every rank must get here, or the rest hang.

    Raises RunError, on every rank, where rank 0 cannot write.
    """
    tensors = {name: _whole(tensor, world) for name, tensor in trained_tensors(policy.model).items()}

    def save() -> None:
        with storage_errors(folder):
            save_file({name: whole for name, whole in tensors.items() if whole is not None}, folder / TENSORS, FORM)

    on_main(world, save)


FORM = {"format": "pt"}
"""The metadata of a file of tensors, without which some readers refuse it."""


def _whole(tensor: Tensor, world: World) -> Tensor | None:
    """Returns a whole tensor in host memory on rank 0, None on others. Every rank must get here, or the rest hang."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone() if world.is_main else None


def num_bytes(model: nn.Module) -> int:
    """Returns the bytes of the file that `save_adapters` writes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in trained_tensors(model).values())


def write_adapter_config(folder: Path, policy: Policy, base: str) -> None:
    """Writes adapter_config.json, which names the base as `base`."""
    content = policy.model.peft_config[ADAPTER].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    write_file(folder / ADAPTER_CONFIG, (json.dumps(_plain(content), indent=2, sort_keys=True) + "\n").encode())


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it; sets are sorted."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if hasattr(value, "value") else value
