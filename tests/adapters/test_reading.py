"""Folders of adapters: what is read, what is refused and in which words. The oracle is peft, which writes them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dpo.adapters.kinds import DECIDING, KINDS, TELLING
from dpo.adapters.reading import read_notes, read_spec
from dpo.adapters.spec import AdapterSpec
from dpo.base.errors import UserError

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ABSENT = object()
"""In place of a value: the key is not there."""


def save(folder: Path, **changes: Any) -> Path:
    """A folder of adapters without tensors."""
    folder.mkdir(exist_ok=True)
    settings = {key: value for key, value in (GOOD | changes).items() if value is not ABSENT}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({}, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        read_spec(folder)
    assert "\n" not in str(caught.value)
    return caught.value


# --- right -----------------------------------------------------------------------------------------------------------


def test_what_peft_writes_is_read(tmp_path: Path) -> None:
    """Every key of peft's own class at its default, and those that decide at values of their own."""
    config = LoraConfig(
        r=6,
        lora_alpha=24,
        target_modules=["q_proj", "down_proj"],
        exclude_modules=["x"],
        use_rslora=True,
        use_dora=True,
        rank_pattern={"down_proj": 2},
        alpha_pattern={".*q_proj": 3},
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
        fan_in_fan_out=True,
        ensure_weight_tying=True,
        init_lora_weights="gaussian",
        base_model_name_or_path="base",
    )
    config.save_pretrained(str(tmp_path))
    save_file({}, tmp_path / "adapter_model.safetensors")
    spec = read_spec(tmp_path)
    assert set(spec.target_modules) == {"q_proj", "down_proj"}
    assert spec == AdapterSpec(
        rank=6,
        alpha=24.0,
        target_modules=spec.target_modules,
        exclude_modules=("x",),
        rslora=True,
        dora=True,
        rank_pattern={"down_proj": 2},
        alpha_pattern={".*q_proj": 3.0},
        layers_to_transform=(0, 1),
        layers_pattern=("layers",),
        trained_modules=("lm_head",),
        ties=True,
        of_peft=True,
        folder=tmp_path,
    )


def test_how_the_base_was_quantized_is_read_with_the_tensors(tmp_path: Path) -> None:
    """adapter_config.json has no key for it that peft would accept."""
    folder = save(tmp_path / "adapters")
    assert read_spec(folder).quantize is None
    save_file({}, folder / "adapter_model.safetensors", {"format": "pt", "quantize": "nf4"})
    assert read_spec(folder).quantize == "nf4"


def test_every_key_of_peft_is_on_a_list(tmp_path: Path) -> None:
    """A newer peft with a new key fails here, before a user meets it."""
    words = ("peft_type", "task_type", "bias", "init_lora_weights")
    known = {*DECIDING, *TELLING, *KINDS, *words}
    assert set(LoraConfig(target_modules=["q_proj"]).to_dict()) <= known
    assert len(known) == len(DECIDING) + len(TELLING) + len(KINDS) + len(words)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"target_modules": "all-linear"}, "target_modules", "all-linear"),
        ({"target_modules": "All-Linear"}, "target_modules", "all-linear"),
        ({"target_modules": r".*\.q_proj"}, "target_modules", r".*\.q_proj"),
        ({"target_modules": "q_proj"}, "target_modules", "(?:q_proj)"),
        ({"target_modules": ["q_proj", "a+b"]}, "target_modules", ("q_proj", r"(?:.*\.)?a\+b")),
        ({"target_modules": None, "target_parameters": ["experts.w"]}, "target_modules", ()),
        ({"target_parameters": ["experts.w"]}, "target_parameters", ("experts.w",)),
        ({"exclude_modules": None}, "exclude_modules", ()),
        ({"exclude_modules": []}, "exclude_modules", ()),
        ({"exclude_modules": "lm_head"}, "exclude_modules", "(?:lm_head)"),
        ({"layers_to_transform": 3}, "layers_to_transform", (3,)),
        ({"layers_to_transform": []}, "layers_to_transform", None),
        ({"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, "layers_pattern", ("h", "layers")),
        ({"lora_alpha": 0.5}, "alpha", 0.5),
        ({"lora_alpha": 16}, "alpha", 16.0),
        ({"rank_pattern": None, "alpha_pattern": None}, "rank_pattern", {}),
        ({"use_dora": None, "use_rslora": ABSENT}, "dora", False),
        ({"lora_dropout": 0.1}, "rank", 4),
        ({"init_lora_weights": True}, "rank", 4),
        ({"init_lora_weights": False}, "rank", 4),
        ({"init_lora_weights": "gaussian"}, "rank", 4),
        ({"init_lora_weights": "default"}, "rank", 4),
        ({"init_lora_weights": "orthogonal"}, "rank", 4),
        ({"bias": None, "task_type": None}, "rank", 4),
        ({"bias": "none", "task_type": "CAUSAL_LM"}, "rank", 4),
        ({"lora_bias": False, "loftq_config": {}, "layer_replication": []}, "rank", 4),
        ({"qalora_group_size": 16, "megatron_core": "megatron.core"}, "rank", 4),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "y"}, "revision": "main"}, "rank", 4),
        ({"runtime_config": {"ephemeral_gpu_offload": False}, "inference_mode": True}, "rank", 4),
        ({"new_null": None, "new_false": False, "new_dict": {}, "new_list": []}, "rank", 4),
        ({"enable_lora": None, "merge_weights": False}, "rank", 4),  # of peft 0.2
    ],
)
def test_right_values(changes: dict[str, Any], field: str, value: Any, tmp_path: Path) -> None:
    assert getattr(read_spec(save(tmp_path, **changes)), field) == value


# --- wrong values ----------------------------------------------------------------------------------------------------

INTEGER, NUMBER = "an integer >= 1 and < 65536", "a number > 0"
VALUES: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, f"r: got 0; valid: {INTEGER}"),
    ({"r": -1}, f"r: got -1; valid: {INTEGER}"),
    ({"r": 2**62}, f"r: got {2**62}; valid: {INTEGER}"),
    ({"r": True}, "r: got true; valid: an integer"),
    ({"r": "8"}, "r: got the text '8'; valid: an integer"),
    ({"r": 8.5}, "r: got the number 8.5; valid: an integer"),
    ({"r": None}, "r: got null; valid: an integer"),
    ({"r": ABSENT}, "r: is missing; valid: the rank"),
    ({"lora_alpha": ABSENT}, f"lora_alpha: is missing; valid: {NUMBER}"),
    ({"lora_alpha": 0}, f"lora_alpha: must be > 0, got 0; valid: {NUMBER}"),
    ({"lora_alpha": "16"}, "lora_alpha: got the text '16'; valid: a finite number"),
    ({"lora_alpha": float("nan")}, "lora_alpha: got the number nan; valid: a finite number"),
    ({"lora_alpha": False}, "lora_alpha: got false; valid: a finite number"),
    ({"target_modules": ABSENT},
     "target_modules: names nothing; valid: names of layers, a pattern of them, or all-linear"),
    ({"target_modules": []}, "target_modules: names nothing; valid: names of layers, a pattern of them, or all-linear"),
    ({"target_modules": {"q_proj": 1}},
     "target_modules: got a mapping {'q_proj': 1}; valid: text (not empty) or a list of texts"),
    ({"target_modules": ["q_proj", 3]}, "target_modules[1]: got the integer 3; valid: text (not empty)"),
    ({"target_modules": "(q"},
     "target_modules: '(q' is no pattern: missing ), unterminated subpattern at position 0"
     "; valid: a regular expression"),
    ({"exclude_modules": "*q"},
     "exclude_modules: '*q' is no pattern: nothing to repeat at position 0; valid: a regular expression"),
    ({"target_parameters": "w"}, "target_parameters: got the text 'w'; valid: a list of texts"),
    ({"rank_pattern": []}, "rank_pattern: got a list []; valid: a mapping {NAME: VALUE, ...}"),
    ({"rank_pattern": {"q_proj": 0}}, f"rank_pattern.q_proj: got 0; valid: {INTEGER}"),
    ({"rank_pattern": {"q_proj": True}}, "rank_pattern.q_proj: got true; valid: an integer"),
    ({"rank_pattern": {"[": 1}},
     "rank_pattern: '[' is no pattern: unterminated character set at position 0; valid: a regular expression"),
    ({"alpha_pattern": {"q_proj": -2}}, f"alpha_pattern.q_proj: must be > 0, got -2; valid: {NUMBER}"),
    ({"layers_to_transform": [0, -1]}, "layers_to_transform: must be >= 0; valid: numbers of layers, from 0"),
    ({"layers_to_transform": "0"}, "layers_to_transform: got the text '0'; valid: an integer or a list of integers"),
    ({"layers_to_transform": [0], "target_modules": ".*q"},
     "layers_to_transform: target_modules is a pattern of whole names; valid: null, or a list there"),
    ({"layers_pattern": "h"}, "layers_pattern: layers_to_transform is null; valid: null, or numbers of layers there"),
    ({"layers_pattern": "(", "layers_to_transform": 1},
     "layers_pattern: '(' is no pattern: missing ), unterminated subpattern at position 0"
     "; valid: a regular expression"),
    ({"modules_to_save": "lm_head"}, "modules_to_save: got the text 'lm_head'; valid: a list of texts"),
    ({"use_dora": 1}, "use_dora: got the integer 1; valid: true or false"),
    ({"use_rslora": "yes"}, "use_rslora: got the text 'yes'; valid: true or false"),
    ({"fan_in_fan_out": "no"}, "fan_in_fan_out: got the text 'no'; valid: true or false"),
    ({"ensure_weight_tying": 1}, "ensure_weight_tying: got the integer 1; valid: true or false"),
    ({"lora_dropout": 1}, "lora_dropout: must be >= 0 and < 1, got 1; valid: a number >= 0 and < 1"),
    ({"lora_dropout": "0.1"}, "lora_dropout: got the text '0.1'; valid: a finite number"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "line"), VALUES, ids=lambda case: case[:50] if isinstance(case, str) else "")
def test_a_wrong_value_is_one_line(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    folder = save(tmp_path, **changes)
    assert str(refused(folder)) == f"{folder}/adapter_config.json: {line}"


# --- other kinds -----------------------------------------------------------------------------------------------------


def of_kind(what: str) -> str:
    return f"{what}; valid: null, as in plain LoRA"


def of_start(name: str) -> str:
    valid = "true, false, gaussian, orthogonal; peft converts others where it saves them"
    return f"init_lora_weights: adapters that start as {name} are not supported; valid: {valid}"


OTHER_KINDS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"peft_type": kind}, f"peft_type: adapters of the kind {kind} are not supported; valid: LORA")
        for kind in ("IA3", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADALORA", "LOHA", "OFT", "VERA")
    ),
    ({"peft_type": ABSENT}, "peft_type: is missing; valid: LORA"),
    ({"peft_type": "IA3", "r": ABSENT, "x": 1}, "peft_type: adapters of the kind IA3 are not supported; valid: LORA"),
    ({"init_lora_weights": "pissa"}, of_start("PiSSA")),
    ({"init_lora_weights": "pissa_niter_16"}, of_start("PiSSA")),
    ({"init_lora_weights": "olora"}, of_start("OLoRA")),
    ({"init_lora_weights": "OLoRA"}, of_start("OLoRA")),
    ({"init_lora_weights": "eva"}, of_start("EVA")),
    ({"init_lora_weights": "corda"}, of_start("CorDA")),
    ({"init_lora_weights": "loftq"}, of_start("LoftQ")),
    ({"init_lora_weights": "lora_ga"}, of_start("LoRA-GA")),
    ({"init_lora_weights": "mica"}, of_start("MiCA")),
    ({"init_lora_weights": "some"}, of_start("some")),
    ({"init_lora_weights": 1}, of_start("1")),
    ({"bias": "all"}, "bias: adapters with trained biases are not supported, got all; valid: none"),
    ({"bias": "lora_only"}, "bias: adapters with trained biases are not supported, got lora_only; valid: none"),
    ({"task_type": "SEQ_CLS"}, "task_type: the task SEQ_CLS is not supported; valid: CAUSAL_LM, null"),
    ({"lora_bias": True}, of_kind("lora_bias: a bias of each adapter is not supported, got True")),
    ({"trainable_token_indices": [5]},
     of_kind("trainable_token_indices: trained rows of the embeddings is not supported, got [5]")),
    ({"layer_replication": [[0, 2]]},
     of_kind("layer_replication: layers that are repeated is not supported, got [[0, 2]]")),
    ({"alora_invocation_tokens": [7]}, of_kind("alora_invocation_tokens: aLoRA is not supported, got [7]")),
    ({"use_qalora": True}, of_kind("use_qalora: QALoRA is not supported, got True")),
    ({"use_bdlora": {"nblocks": 2}}, of_kind("use_bdlora: BD-LoRA is not supported, got {'nblocks': 2}")),
    *(
        ({key: {"a": 1}}, of_kind(f"{key}: {name} is not supported, got {{'a': 1}}"))
        for key, name in {
            "arrow_config": "Arrow", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA",
            "velora_config": "VeLoRA", "megatron_config": "layers of Megatron", "loftq_config": "LoftQ",
            "eva_config": "EVA", "corda_config": "CorDA", "lora_ga_config": "LoRA-GA",
        }.items()
    ),
    ({"use_new_thing": True}, of_kind("use_new_thing: is an unknown key, got True")),
    ({"new_size": 0}, of_kind("new_size: is an unknown key, got 0")),
    ({"new_name": "x" * 99}, of_kind(f"new_name: is an unknown key, got {'x' * 57}...")),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "line"), OTHER_KINDS, ids=lambda case: case[:50] if isinstance(case, str) else "")
def test_another_kind_is_refused_by_name(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    folder = save(tmp_path, **changes)
    assert str(refused(folder)) == f"{folder}/adapter_config.json: {line}"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "not readable as JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"", "not readable as JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"\xff", "not readable as JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"[1]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b'"LORA"', "holds no JSON object"),
    ],
)
def test_a_broken_config_is_one_line(content: bytes, what: str, tmp_path: Path) -> None:
    path = save(tmp_path) / "adapter_config.json"
    path.write_bytes(content)
    assert str(refused(tmp_path)) == f"{path}: {what}; valid: the file that peft wrote"


def test_brackets_that_are_nested_too_deep(tmp_path: Path) -> None:
    (save(tmp_path) / "adapter_config.json").write_text("[" * 100_000)
    assert refused(tmp_path).what.startswith("not readable as JSON: ")


def test_a_folder_without_adapters(tmp_path: Path) -> None:
    failure = refused(tmp_path)
    what = f"lora.path: {tmp_path} has no adapter_config.json"
    assert str(failure) == f"{what}; valid: a folder of adapters in peft's form, or its hub id"
    (tmp_path / "config.json").write_text("{}")
    what = f"lora.path: {tmp_path} holds a model, not adapters"
    assert str(refused(tmp_path)) == f"{what}; valid: a folder of adapters; a model goes to model.path"


def test_a_folder_without_tensors(tmp_path: Path) -> None:
    (save(tmp_path) / "adapter_model.safetensors").unlink()
    what = f"{tmp_path}: has no adapter_model.safetensors"
    assert str(refused(tmp_path)) == f"{what}; valid: adapter_config.json and adapter_model.safetensors"


def test_pickled_tensors_come_with_a_command_that_converts_them(tmp_path: Path) -> None:
    """The command is run; views of one tensor, which safetensors refuses, and transposed ones are no obstacle."""
    folder = save(tmp_path / "of sft")
    (folder / "adapter_model.safetensors").unlink()
    both = torch.arange(12.0).reshape(2, 6)
    tensors = {"a": both[:1], "b": both.T, "c": both}
    torch.save(tensors, folder / "adapter_model.bin")
    what, command = refused(folder).what.split("; convert it with: ")
    assert what == "has its tensors in adapter_model.bin, which can hold code"
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *words[1:]], check=True)
    converted = load_file(folder / "adapter_model.safetensors")
    assert set(converted) == set(tensors) and all(torch.equal(converted[name], tensors[name]) for name in tensors)
    assert read_spec(folder).rank == 4


def test_a_pickled_file_beside_the_tensors_is_ignored(tmp_path: Path) -> None:
    (save(tmp_path) / "adapter_model.bin").write_bytes(b"x")
    assert read_spec(tmp_path).rank == 4


# --- told ------------------------------------------------------------------------------------------------------------


def test_dropout_and_another_base_are_told(tmp_path: Path) -> None:
    folder = save(tmp_path, lora_dropout=0.05, base_model_name_or_path="org/other")
    path = folder / "adapter_config.json"
    assert read_notes(folder, "org/base") == [
        f"{path}: lora_dropout 0.05 is taken as 0: adapters have no dropout here",
        f"{path}: the adapters are for org/other, and model.path is org/base: their tensors decide if they fit",
    ]


@pytest.mark.parametrize("named", [None, "", "org/base", "./base", ABSENT])
def test_the_same_base_is_not_told(named: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, or as the same folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    folder = save(tmp_path / "sft", base_model_name_or_path=named, lora_dropout=0.0)
    assert read_notes(folder, str(tmp_path / "base") if named == "./base" else "org/base") == []


def test_tensors_are_not_read(tmp_path: Path) -> None:
    """The file is broken: what is wrong with the config is told before."""
    folder = save(tmp_path, r=0)
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    assert "r: got 0" in str(refused(folder))
