"""Adapters for tests, written and run by peft alone: folders of adapters with an effect, and plain models with them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dpo.adapters.spec import AdapterSpec
from tests.support.models import plain_model


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Lets peft warn inside: of names that transformers gives up, of Conv1D's transposed weights, of tied weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_adapter(
    folder: Path, model: Path, spread: float = 0.3, seed: int = 3, embeddings: bool = False, **keys: Any
) -> Path:
    """A folder of adapters in peft's form for a model folder. The numbers of B are normal, of the standard deviation
    `spread`; 0: the adapters have no effect. Magnitudes of DoRA are changed by about a tenth.

    Args:
        folder: where it is written.
        model: the folder of the base.
        spread: of the numbers of B.
        seed: of all numbers.
        embeddings: whether embeddings and head are in the folder too, in the form of `save_embedding_layers`.
        keys: of peft's config; r 3 and lora_alpha 5 by default.
    """
    facts = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    with peft_warnings():
        peft = get_peft_model(plain_model(model), LoraConfig(**(facts | keys)))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(spread * torch.randn_like(parameter))
            if ".lora_magnitude_vector." in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    with peft_warnings():
        peft.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def plain_peft(model: Path, adapter: Path, dtype: torch.dtype, embeddings: bool = False) -> Any:
    """The model with the adapters as anyone would load them, ready to train.

    Args:
        model: the folder of the base.
        adapter: the folder of the adapters.
        dtype: of the base; the adapters are converted to it.
        embeddings: whether embeddings and head are trained too.
    """
    base = plain_model(model, dtype)
    with peft_warnings():
        peft = PeftModel.from_pretrained(base, adapter, is_trainable=True, autocast_adapter_dtype=False).to(dtype)
    for module in (base.get_input_embeddings(), base.get_output_embeddings()) if embeddings else ():
        nn.Module.requires_grad_(module, True)
    return peft.eval()


def spec_of(adapter: Path | None, **changes: Any) -> AdapterSpec:
    """The trainer's form of `save_adapter`'s defaults, with these values changed."""
    return AdapterSpec(**({"rank": 3, "alpha": 5.0, "folder": adapter} | changes))
