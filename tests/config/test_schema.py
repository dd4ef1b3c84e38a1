"""The JSON schema of the YAML file, against the reader of the trainer: what it accepts, what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpo.base.errors import UserError
from dpo.config.keys import KEYS
from dpo.config.load import load_config
from dpo.config.schema import config_schema
from dpo.config.shipped import shipped_configs
from dpo.config.strict_yaml import parse_yaml, read_yaml_file

CORPUS = Path(__file__).parents[1] / "bad_inputs" / "config"
SCHEMA = config_schema()
BETWEEN_KEYS = """
    float32_model_computing_in_float64 float32_model_reducing_in_float64 float64_model_computing_in_float32
    float64_model_reducing_in_float32 floor_of_constant gamma_of_dpo holdout_in_eval holdout_of_all holdout_of_zero
    no_training_source prompt_as_long_as_all sft_length_normalized sft_with_sft_weight smoothing_of_ipo steps_and_epochs
    negative_warmup warmup_above_one warmup_of_nought warmup_of_one tf32_of_bfloat16 alpha_without_rank
    quantize_without_rank quantized_experts
    targets_without_rank dora_without_rank no_targets no_exclusions no_target_parameters broken_pattern
    base_without_adapters base_beside_reference
""".split()
"""Files that break a rule between keys, or one that is no limit of a number: a schema has no words for them."""
MISSING = "missing_model_path missing_train empty_file".split()
"""Files that are no error of their own, since the command line may give the key."""
NUMBERS = "number_for_integer integer_too_large".split()
"""64.0 is an integer to a schema, and no integer is too large."""
UNSAID = [*BETWEEN_KEYS, *MISSING, *NUMBERS]
TYPES = {"boolean": bool, "string": str, "null": type(None), "object": dict, "array": list}


def faults(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """What the schema does not accept; the words of draft 2020-12 that it uses, as the draft defines them."""
    if "anyOf" in schema and all(faults(value, choice, place) for choice in schema["anyOf"]):
        return [place]
    found = []
    kind = schema.get("type")
    is_number = type(value) is int or (isinstance(value, float) and math.isfinite(value))
    if kind in TYPES and not isinstance(value, TYPES[kind]):
        found.append(place)
    if (kind == "number" and not is_number) or (kind == "integer" and not (is_number and value == int(value))):
        found.append(place)
    if "enum" in schema and value not in schema["enum"]:
        found.append(place)
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        found.append(place)
    if is_number:
        low = value < schema.get("minimum", -math.inf) or value <= schema.get("exclusiveMinimum", -math.inf)
        found += [place] if low or value >= schema.get("exclusiveMaximum", math.inf) else []
    if isinstance(value, dict):
        found += [f"{place}.{name}" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", True))
            found += [f"{place}.{name}"] if inner is False else []
            found += faults(item, inner, f"{place}.{name}") if isinstance(inner, dict) else []
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        found += [place] if len(value) < schema.get("minItems", 0) else []
        for i, item in enumerate(value):
            inner = first[i] if i < len(first) else schema.get("items", True)
            found += [f"{place}[{i}]"] if inner is False else []
            found += faults(item, inner, f"{place}[{i}]") if isinstance(inner, dict) else []
    return found


@pytest.mark.parametrize("file", shipped_configs(), ids=lambda file: file.stem)
def test_shipped_configs_are_valid(file: Path) -> None:
    assert faults(read_yaml_file(str(file)), SCHEMA) == []


def _bad_files() -> list[Path]:
    return [file for file in sorted(CORPUS.glob("*.yaml")) if file.stem not in UNSAID]


@pytest.mark.parametrize("file", _bad_files(), ids=lambda file: file.stem)
def test_what_the_trainer_refuses_is_refused(file: Path) -> None:
    """Files that are no YAML have no schema."""
    try:
        tree = read_yaml_file(str(file))
    except UserError:
        return
    assert faults(tree, SCHEMA)


@pytest.mark.parametrize("name", UNSAID)
def test_what_a_schema_cannot_say(name: str) -> None:
    """The lists above hold nothing that it could."""
    tree = read_yaml_file(str(CORPUS / f"{name}.yaml"))
    assert faults({} if tree is None else tree, SCHEMA) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("optim: {lrr: 1e-5}", ".optim.lrr"),
        ("learning_rate: 1e-5", ".learning_rate"),
        ("loss: {name: sigmoid}", ".loss.name"),
        ("optim: {lr: 0}", ".optim.lr"),
        ("optim: {betas: [0.9, 1]}", ".optim.betas[1]"),
        ("train: {profile_steps: [0, 3]}", ".train.profile_steps"),
        ("data: {train: [{split: x}]}", ".data.train[0].path"),
        ("data: {train: [{path: x, formats: hh}]}", ".data.train[0].formats"),
        ("train: {seed: -1}", ".train.seed"),
        ("lora: {target_modules: [q_proj, 3]}", ".lora.target_modules"),
        ("lora: {target_modules: 3}", ".lora.target_modules"),
        ("lora: {alpha: 0}", ".lora.alpha"),
    ],
)
def test_a_mistake_is_found_at_its_place(text: str, place: str) -> None:
    assert faults(parse_yaml(text, str, ""), SCHEMA) == [place]


@pytest.mark.parametrize("value", ["q_proj", "[q_proj, v_proj]", "null", "all-linear"])
def test_a_text_or_a_list_of_them_is_valid(value: str) -> None:
    assert faults(parse_yaml(f"lora: {{rank: 4, target_modules: {value}}}", str, ""), SCHEMA) == []


def test_every_key_has_its_text_and_default() -> None:
    """The defaults are those of the reader."""
    sections = SCHEMA["properties"]
    found = {
        f"{name}.{key}": schema for name, section in sections.items() for key, schema in section["properties"].items()
    }
    assert list(found) == list(KEYS)
    assert all(len(schema["description"].split()) >= 3 for schema in found.values())
    config = load_config(["model.path=m", "data.train=[{path: a}]"], "dpo.train")
    for key, schema in found.items():
        section, _, name = key.partition(".")
        if key not in ("model.path", "data.train", "train.run_dir"):
            assert schema["default"] == getattr(getattr(config, section), name), key


def test_the_flag_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--config-schema"], "dpo.train")
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(SCHEMA))
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
