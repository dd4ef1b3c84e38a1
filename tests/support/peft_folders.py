"""Folders of LoRA adapters as peft writes them, and the oracle: a plain model with adapters as peft loads it."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch

from tests.support.models import plain_model


def save_adapter(folder: Path, base: Path, seed: int = 0, has_effect: bool = True, **settings: Any) -> Path:
    """A folder of adapters of rank 4 for the model in `base`, on all its linear layers; `settings` are peft's. A is
    random, and B too unless it is to have no effect.
    """
    torch.manual_seed(seed)
    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that peft uses, and of Conv1D, which it sees by itself
        model = peft.get_peft_model(plain_model(base), peft.LoraConfig(**chosen | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if has_effect and ".lora_B." in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def adapted_model(base: Path, folder: Path) -> Any:
    """The model in `base` with the adapters in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(plain_model(base), folder).eval()
