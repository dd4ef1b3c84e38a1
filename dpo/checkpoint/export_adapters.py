"""Writes trained adapters as a folder in peft's form, which `PeftModel.from_pretrained` and transformers load."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.adapters.names import written_name
from dpo.adapters.reading import QUANTIZE
from dpo.adapters.spec import ADAPTER
from dpo.adapters.start import trained_tensors
from dpo.base.files import write_file
from dpo.distributed.collectives import on_main
from dpo.distributed.shards import whole
from dpo.distributed.world import World
from dpo.hub.files import ADAPTER_CONFIG, ADAPTER_TENSORS
from dpo.model.policy import Policy
from dpo.watch.failures import storage_errors

FORM = {"format": "pt"}
"""The metadata of a file of tensors, without which some readers refuse it."""


def save_adapters(folder: Path, policy: Policy, dtype: torch.dtype, world: World) -> None:
    """Writes what is trained, in `dtype`. Every rank must get here, or the rest hang.

    Raises RunError, on every rank, where rank 0 cannot write.
    """
    tensors = {name: _on_main(tensor, dtype, world) for name, tensor in trained_tensors(policy.model).items()}
    own = {written_name(name): tensor for name, tensor in tensors.items() if tensor is not None}
    quantize = policy.adapters.quantize if policy.adapters else None

    def save() -> None:
        with storage_errors(folder):
            save_file(own, folder / ADAPTER_TENSORS, FORM | ({QUANTIZE: quantize} if quantize else {}))

    on_main(world, save)


def _on_main(tensor: Tensor, dtype: torch.dtype, world: World) -> Tensor | None:
    """Returns a whole tensor in host memory on rank 0, None on others. Every rank must get here, or the rest hang."""
    gathered = whole(tensor).detach()
    return gathered.to("cpu", dtype, copy=True) if world.is_main else None


def num_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Returns the bytes of the file that `save_adapters` writes."""
    return sum(tensor.numel() * dtype.itemsize for tensor in trained_tensors(model).values())


def write_adapter_config(folder: Path, policy: Policy, base: str) -> None:
    """Writes adapter_config.json.

    Args:
        folder: the folder of the adapters.
        policy: the model with them.
        base: the folder or hub id of its base. A folder is named by its absolute path, since a relative one would be
            looked for in the reader's working directory.
    """
    changed = {
        "base_model_name_or_path": str(Path(base).absolute()) if Path(base).exists() else base,
        "inference_mode": True,
        "modules_to_save": modules_to_save(policy) or None,
        "ensure_weight_tying": trains_tied(policy.model),
    }
    content = _plain(policy.model.peft_config[ADAPTER].to_dict() | changed)
    write_file(folder / ADAPTER_CONFIG, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def modules_to_save(policy: Policy) -> list[str]:
    """Returns the names of the modules that are trained whole, sorted: the last parts of their names where no other
    module's name ends so, which is how peft looks for them, else whole names.
    """
    model, spec = policy.model, policy.adapters
    assert spec is not None
    names = [name for name, _ in model.named_modules()]
    ends = (model.get_input_embeddings(), model.get_output_embeddings()) if spec.embeddings else ()
    whole = [name for name, module in model.named_modules() if module in ends]
    return sorted({*spec.trained_modules, *(_shortest(name, names) for name in whole)})


def trains_tied(model: PreTrainedModel) -> bool:
    """Returns whether an embedding that is the head too is trained whole: peft would train two copies of it, unless
    `ensure_weight_tying` says otherwise.
    """
    embedding: Any = model.get_input_embeddings()
    return bool(model.all_tied_weights_keys) and bool(embedding.weight.requires_grad)


def _shortest(name: str, names: Sequence[str]) -> str:
    """Returns the last part of a module's name where only this one of `names` ends so, else the whole name."""
    last = name.rpartition(".")[2]
    return last if sum(other.endswith(last) for other in names) == 1 else name


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it; sets are sorted."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if hasattr(value, "value") else value
