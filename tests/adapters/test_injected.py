"""Folders that peft has written, put into a model by their config: the same layers, ranks, scalings and tensors as in
peft's own model."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from dpo.adapters.inject import inject
from dpo.adapters.names import base_name
from dpo.adapters.reading import read_spec
from dpo.adapters.spec import AdapterSpec
from dpo.adapters.start import trained_tensors
from tests.support.models import family_config

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    ("llama", {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\.mlp\..*": 3, "q_proj": 5}}),
    ("llama", {"target_modules": "all-linear", "alpha_pattern": {r".*\.0\..*": 1}, "use_rslora": True}),
    ("llama", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    ("llama", {"target_modules": r".*\.1\..*_proj", "exclude_modules": r".*\.mlp\..*"}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]}),
    ("llama", {"target_modules": ["q_proj", "not_there"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp.up_proj", "model.norm"]}),
    ("llama", {"target_modules": ["k_proj", "down_proj"], "use_dora": True, "rank_pattern": {"k_proj": 1}}),
    ("llama-tied", {"target_modules": ["q_proj"]}),
    ("gpt2", {"target_modules": "all-linear", "use_dora": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["mlp.c_proj"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("gpt-neox", {"target_modules": ["query_key_value"], "alpha_pattern": {"query_key_value": 7}}),
    ("qwen3-tied", {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
]


def meta_model(family: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(family_config(family))


def injected(family: str, spec: AdapterSpec) -> Any:
    model = meta_model(family)
    inject(model, spec, torch.float32, torch.float32)
    return model


def layers_of(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scaling of each adapted layer, by its name in the model without adapters."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    facts = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in found.items()}
    return {base_name(name).removeprefix("base_model.model."): value for name, value in facts.items()}


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_folder_makes_the_model_that_peft_makes(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=6, **settings)
        peft = get_peft_model(AutoModelForCausalLM.from_config(family_config(family)), config)
        peft.save_pretrained(str(tmp_path))
    model = injected(family, read_spec(tmp_path))
    assert layers_of(model) == layers_of(peft) != {}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in trained_tensors(model).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "qwen3-tied"])
def test_keys_make_adapters_of_one_rank(family: str) -> None:
    """alpha / rank is 2 by default, and alpha / sqrt(rank) with rsLoRA."""
    plain = injected(family, AdapterSpec(4, 8.0))
    assert set(layers_of(plain).values()) == {(4, 2.0)}
    assert set(layers_of(injected(family, AdapterSpec(4, 8.0, rslora=True))).values()) == {(4, 4.0)}
    trained = [name for name, parameter in plain.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
