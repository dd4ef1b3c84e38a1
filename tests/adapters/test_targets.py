"""The layers that get adapters, against lists written by hand, and against peft's own reading of the same words."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo.adapters.spec import AdapterSpec
from dpo.adapters.targets import find_targets
from dpo.base.errors import UserError
from tests.support.models import FAMILIES, VOCAB, family_config

LLAMA = {
    "self_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
}
"""The linear layers of a decoder layer, by its parts."""
NEOX = {
    "attention": ["attention.query_key_value", "attention.dense"],
    "mlp": ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
}
GPT2 = {"attn": ["attn.c_attn", "attn.c_proj"], "mlp": ["mlp.c_fc", "mlp.c_proj"]}
LAYERS = {"llama": ("model.layers", LLAMA), "gpt-neox": ("gpt_neox.layers", NEOX), "gpt2": ("transformer.h", GPT2)}
"""Kind of family -> the name of its list of decoder layers, and what is in each."""
MOE = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "vocab_size": VOCAB, "pad_token_id": 0,
}  # fmt: skip


def meta_model(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(family_config(family))


def mixture() -> PreTrainedModel:
    """Its routers have a parameter of their own, but for that of the shared expert, which is a linear layer."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **MOE))


def by_hand(family: str) -> tuple[str, dict[str, list[str]]]:
    return next((facts for kind, facts in LAYERS.items() if family.startswith(kind)), LAYERS["llama"])


def whole_names(layers: str, ends: Sequence[str], numbers: Sequence[int] = (0, 1)) -> list[str]:
    return sorted(f"{layers}.{number}.{end}" for number in numbers for end in ends)


def targets(model: PreTrainedModel, modules: Any, **more: Any) -> list[str]:
    """The whole names of the layers that `find_targets` means, as peft would take its names."""
    found = find_targets(model, AdapterSpec(4, 8, modules, **more))
    names = [name for name, _ in model.named_modules()]
    return sorted(name for name in names if any(f".{name}".endswith(f".{word}") for word in found))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_attention_and_mlp(family: str) -> None:
    layers, parts = by_hand(family)
    assert targets(meta_model(family), "all-linear") == whole_names(
        layers, [end for part in parts.values() for end in part]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_that_of_peft(family: str) -> None:
    model = meta_model(family)
    peft = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model)
    assert targets(model, "all-linear") == sorted(peft.target_modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_by_pattern_and_by_exclusion(family: str) -> None:
    layers, parts = by_hand(family)
    (attention, of_attention), (_, of_mlp) = parts.items()
    model = meta_model(family)
    assert targets(model, rf".*\.{attention}\..*") == whole_names(layers, of_attention)
    assert targets(model, "all-linear", exclude_modules=(rf".*\.{attention}\..*",)) == whole_names(layers, of_mlp)
    assert targets(model, "all-linear", exclude_modules=tuple(of_mlp)) == whole_names(layers, of_attention)


CASES: list[tuple[str, Any, list[str]]] = [
    ("llama", ("q_proj", "v_proj"), whole_names("model.layers", ["self_attn.q_proj", "self_attn.v_proj"])),
    ("llama", "q_proj", whole_names("model.layers", ["self_attn.q_proj"])),
    ("llama", "self_attn.q_proj", whole_names("model.layers", ["self_attn.q_proj"])),
    ("llama", "model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
    ("llama", ("o_proj", r".*\.1\.mlp\.(gate|up)_proj"),
     whole_names("model.layers", ["self_attn.o_proj"]) + whole_names("model.layers", LLAMA["mlp"][:2], [1])),
    ("llama", ("all-linear", "o_proj"), whole_names("model.layers", LLAMA["self_attn"] + LLAMA["mlp"])),
    ("llama", ".*", whole_names("model.layers", LLAMA["self_attn"] + LLAMA["mlp"])),
    ("gpt-neox", "query_key_value", whole_names("gpt_neox.layers", ["attention.query_key_value"])),
    ("gpt-neox", "dense", whole_names("gpt_neox.layers", ["attention.dense"])),
    ("gpt2", "c_proj", whole_names("transformer.h", ["attn.c_proj", "mlp.c_proj"])),
    ("gpt2", ("c_attn", "attn.c_proj"), whole_names("transformer.h", GPT2["attn"])),
]  # fmt: skip


@pytest.mark.parametrize(("family", "words", "expected"), CASES)
def test_names_and_patterns(family: str, words: Any, expected: list[str]) -> None:
    assert targets(meta_model(family), words) == sorted(expected)


@pytest.mark.parametrize(
    ("words", "short"),
    [
        ("all-linear", ["c_attn", "c_fc", "c_proj"]),
        ("c_attn", ["c_attn"]),
        ("mlp.c_proj", None),
        ("c_proj", ["c_proj"]),
    ],
)
def test_names_are_short_where_they_can_be(words: str, short: list[str] | None) -> None:
    """c_proj is in both parts of a layer of GPT-2: with one of them alone, the names are whole."""
    expected = short or whole_names("transformer.h", ["mlp.c_proj"])
    assert find_targets(meta_model("gpt2"), AdapterSpec(4, 8, words)) == expected


# --- routers and experts ---------------------------------------------------------------------------------------------

SHARED = ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"]


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        ("all-linear", LLAMA["self_attn"] + SHARED),
        (r".*\.mlp\..*", SHARED),
        ("shared_expert_gate", ["mlp.shared_expert_gate"]),
        (("q_proj", r".*\.shared_expert_gate"), ["self_attn.q_proj", "mlp.shared_expert_gate"]),
        (("all-linear", "shared_expert_gate"), [*LLAMA["self_attn"], *SHARED, "mlp.shared_expert_gate"]),
    ],
)
def test_routers_get_adapters_only_by_their_names(words: Any, ends: list[str]) -> None:
    assert targets(mixture(), words) == whole_names("model.layers", ends)


def test_experts_that_are_linear_layers_are_not_in_all_linear() -> None:
    """As in models of older code; each of them has its name."""
    model = meta_model("llama")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.Linear(32, 32, device="meta") for _ in range(2))
    assert targets(model, "all-linear") == whole_names("model.layers", LLAMA["self_attn"] + LLAMA["mlp"])
    assert targets(model, "experts.1") == whole_names("model.layers", ["mlp.experts.1"])


def test_parameters_of_experts() -> None:
    spec = AdapterSpec(4, 8, ("q_proj",), target_parameters=("experts.gate_up_proj",))
    assert find_targets(mixture(), spec) == ["q_proj"]
    assert find_targets(mixture(), AdapterSpec(4, 8, (), target_parameters=("experts.down_proj",))) == []


# --- refused ---------------------------------------------------------------------------------------------------------

ENDS = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
HEAD = "can get no adapter; valid: lora.train_embeddings true, which trains embeddings and head whole"
WRONG: list[tuple[str, Any, str]] = [
    ("llama", "q_prj", f"'q_prj' fits no linear layer of the model; did you mean q_proj? valid: all-linear, or {ENDS}"),
    ("llama", ("q_proj", "xyz"), f"'xyz' fits no linear layer of the model; valid: all-linear, or {ENDS}"),
    ("llama", "q_proj.*", f"'q_proj.*' fits no linear layer of the model; valid: all-linear, or {ENDS}"),
    ("llama", "self_attn",
     "'self_attn' is no linear layer, but holds some; valid: all-linear, or k_proj, o_proj, q_proj, v_proj"),
    ("gpt2", "mlp", "'mlp' is no linear layer, but holds some; valid: all-linear, or c_fc, c_proj"),
    ("gpt2", "ln_1", "'ln_1' is no linear layer; valid: all-linear, or c_attn, c_fc, c_proj"),
    ("llama", ("q_proj", "lm_head"), f"'lm_head' is lm_head, which {HEAD}"),
    ("llama-tied", "lm_head", f"'lm_head' is lm_head, which {HEAD}"),
    ("llama", "model.embed_tokens", f"'model.embed_tokens' is embed_tokens, which {HEAD}"),
    ("llama", ".*head", f"'.*head' is lm_head, which {HEAD}"),
    ("gpt-neox", "embed_in", f"'embed_in' is embed_in, which {HEAD}"),
    ("gpt2", "wte", f"'wte' is wte, which {HEAD}"),
    ("gpt2", "wpe", f"'wpe' is wpe, which {HEAD}"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "words", "line"), WRONG)
def test_a_target_that_fits_nothing(family: str, words: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        find_targets(meta_model(family), AdapterSpec(4, 8, words))
    assert str(caught.value) == f"lora.target_modules: {line}"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("gate", "'gate' is no linear layer; its parameters can be adapted: lora.target_parameters [gate.weight]"),
        ("experts", "'experts' is no linear layer; its parameters can be adapted: lora.target_parameters"
         " [experts.down_proj, experts.gate_up_proj]"),
        (r".*\.mlp\.[^.]*", "'.*\\\\.mlp\\\\.[^.]*' is no linear layer, but holds some"),
    ],
)  # fmt: skip
def test_routers_and_experts_that_are_no_linear_layers(words: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        find_targets(mixture(), AdapterSpec(4, 8, words))
    assert caught.value.what == what and caught.value.place == "lora.target_modules"


@pytest.mark.parametrize(
    ("build", "word", "valid"),
    [
        (mixture, "experts.up_proj", "experts.down_proj, experts.gate_up_proj"),
        (lambda: meta_model("llama"), "experts.down_proj", "null: the model has no experts"),
    ],
)
def test_a_parameter_that_is_not_there(build: Any, word: str, valid: str) -> None:
    with pytest.raises(UserError) as caught:
        find_targets(build(), AdapterSpec(4, 8, target_parameters=(word,)))
    assert str(caught.value) == f"lora.target_parameters: {word!r} fits no parameter of the model; valid: {valid}"


@pytest.mark.parametrize("folder", [None, Path("sft")])
@pytest.mark.parametrize("word", ["q_proj.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_a_weight_gets_one_adapter(word: str, folder: Path | None) -> None:
    """Merged, the second would be lost; a layer that is no target may have its weight adapted."""
    model, layer = meta_model("llama"), 1 if "layers.1" in word else 0
    assert find_targets(model, AdapterSpec(4, 8, ("v_proj",), target_parameters=(word,), folder=folder)) == ["v_proj"]
    with pytest.raises(UserError) as caught:
        find_targets(model, AdapterSpec(4, 8, ("v_proj", "q_proj"), target_parameters=(word,), folder=folder))
    what = f"{word!r} is the weight of model.layers.{layer}.self_attn.q_proj, which target_modules names too"
    place = "sft/adapter_config.json: target_parameters" if folder else "lora.target_parameters"
    assert str(caught.value) == f"{place}: {what}; valid: each weight in one of the two"


def test_exclusions_must_fit_and_must_leave_some() -> None:
    model = meta_model("llama")
    with pytest.raises(UserError, match=r"^lora\.exclude_modules: 'k_prj' fits no linear .* did you mean k_proj\?"):
        find_targets(model, AdapterSpec(4, 8, exclude_modules=("k_prj",)))
    with pytest.raises(UserError, match=r"^lora\.target_modules: no layer is left after exclude_modules"):
        find_targets(model, AdapterSpec(4, 8, ("q_proj",), exclude_modules=("q_proj",)))
    assert targets(model, ("q_proj",), exclude_modules=("lm_head",))  # it gets none in any case


# --- folders of adapters ---------------------------------------------------------------------------------------------

OF_PEFT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "w1", "down_proj"]}),
    ("llama", {"target_modules": r".*\.(q|up)_proj"}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["mlp.up_proj", "x"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]}),
    ("gpt-neox", {"target_modules": ["query_key_value"], "layers_to_transform": [0]}),
]


@pytest.mark.parametrize(("family", "settings"), OF_PEFT)
def test_a_folder_has_the_targets_that_peft_takes(family: str, settings: dict[str, Any]) -> None:
    model = meta_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**settings)
    expected = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    expected = sorted(name for name in expected if _is_taken(config, name))
    words = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    words["trained_modules"] = words.pop("modules_to_save", ())
    pattern = words.get("layers_pattern")
    words |= {"layers_pattern": (pattern,)} if isinstance(pattern, str) else {}
    modules = words.pop("target_modules")
    assert expected and targets(model, modules, of_peft=True, folder=Path("sft"), **words) == expected


def _is_taken(config: LoraConfig, name: str) -> bool:
    """peft answers with an object of its own, which is false, for a layer that it leaves out."""
    return bool(check_target_module_exists(config, name))


def test_a_folder_with_all_linear_has_routers_as_peft_does() -> None:
    model = mixture()
    peft = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model)
    assert targets(model, "all-linear", of_peft=True, folder=Path("sft")) == sorted(peft.target_modules)
    assert "model.layers.0.mlp.shared_expert_gate" in peft.target_modules


@pytest.mark.parametrize("word", ["embed_tokens", "lm_head", "model.embed_tokens"])
def test_tied_embeddings_that_were_trained_apart(word: str) -> None:
    """As peft trains them unless ensure_weight_tying is set: a copy of one, which changes the other no more."""
    spec = AdapterSpec(4, 8, ("q_proj",), trained_modules=(word,), of_peft=True, folder=Path("sft"))
    with pytest.raises(UserError) as caught:
        find_targets(meta_model("llama-tied"), spec)
    what = "the embeddings of the model are its head too, and the adapters have a copy of one alone"
    valid = "true, or a base with tie_word_embeddings false"
    assert str(caught.value) == f"sft/adapter_config.json: ensure_weight_tying: {what}; valid: {valid}"
    assert find_targets(meta_model("llama-tied"), replace(spec, ties=True)) == ["q_proj"]
    assert find_targets(meta_model("llama"), spec) == ["q_proj"]
    assert find_targets(meta_model("llama-tied"), replace(spec, trained_modules=("norm",))) == ["q_proj"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"target_modules": ("q_proj", "lm_head")},
         "sft/adapter_config.json: target_modules: 'lm_head' is lm_head, which can get no adapter; valid: adapters of"
         " other layers; peft's merge_and_unload makes a whole model of these and their base"),
        ({"target_modules": ("w1", "w2")},
         f"sft/adapter_config.json: target_modules: no layer of the model is a target; valid: all-linear, or {ENDS}"),
        ({"target_modules": ("q_proj",), "layers_to_transform": (7,)},
         f"sft/adapter_config.json: target_modules: no layer of the model is a target; valid: all-linear, or {ENDS}"),
        ({"target_parameters": ("experts.x",)},
         "sft/adapter_config.json: target_parameters: 'experts.x' fits no parameter of the model; valid: null: the"
         " model has no experts"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_named(more: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        find_targets(meta_model("llama"), AdapterSpec(4, 8, of_peft=True, folder=Path("sft"), **more))
