"""What an error about a name that does not exist proposes: TRL's names, names of other sections, and near misses."""

from typing import get_args, get_type_hints

import pytest

from dpo.base.errors import UserError
from dpo.command.likeness import closest
from dpo.config.hints import unknown_flag, unknown_key
from dpo.config.keys import KEYS, SECTIONS
from dpo.config.load import load_config
from dpo.config.trl_names import NOTES, TRL_NAMES, VALUES

NAMES = (
    "learning_rate loss_type num_train_epochs per_device_train_batch_size gradient_accumulation_steps max_steps "
    "warmup_ratio lr_scheduler_type output_dir logging_steps save_steps eval_steps max_prompt_length "
    "max_completion_length rpo_alpha label_smoothing ref_model precompute_ref_log_probs bf16 gradient_checkpointing "
    "deepspeed beta model_name_or_path dataset_name seed optim weight_decay max_grad_norm report_to "
    "push_to_hub use_peft peft_config lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save "
    "use_rslora use_dora load_in_4bit"
).split()
"""The arguments that most scripts of TRL set."""


@pytest.mark.parametrize("name", sorted(TRL_NAMES))
def test_a_counterpart_exists_or_says_why_there_is_none(name: str) -> None:
    found = TRL_NAMES[name]
    assert found.key in KEYS if found.key is not None else found.note


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_trl_is_answered(name: str) -> None:
    """At the top of a file, under a section, and as a flag: with our key, or with the reason why there is none."""
    key = TRL_NAMES[name].key
    wanted = key or "has no counterpart: "
    errors = [unknown_key("f.yaml", name, list(SECTIONS)), unknown_key("f.yaml", f"batch.{name}", ["pairs_per_step"])]
    for error in [*errors, unknown_flag(name, []), unknown_flag(name.replace("_", "-"), ["html"])]:
        assert wanted in error.what and error.valid, str(error)


@pytest.mark.parametrize(("key", "names"), VALUES.items())
def test_other_names_of_values_lead_to_values(key: str, names: dict[str, str]) -> None:
    section, _, name = key.partition(".")
    values = get_args(get_type_hints(SECTIONS[section])[name])
    assert set(names.values()) <= set(values) and not set(names) & set(values)


@pytest.mark.parametrize(("key", "value"), NOTES)
def test_values_that_belong_to_another_key(key: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(["model.path=m", "data.train=[{path: a}]", f"{key}={value}"], "dpo.train")
    assert caught.value.place == f"command line: {key}" and NOTES[key, value] in caught.value.what


def test_a_programs_own_flags_come_first() -> None:
    error = unknown_flag("htm", ["html", "examples"])
    assert error.what == "unknown flag; did you mean --html?" and error.valid.startswith("--html, --examples, --config")


@pytest.mark.parametrize(("name", "end"), [("ranks", "unknown flag"), ("lossx", "unknown flag; did you mean loss?")])
def test_a_section_is_no_wild_guess(name: str, end: str) -> None:
    """--ranks is a flag of other programs: neither lora.rank nor a section is meant."""
    assert unknown_flag(name, ["html"]).what == end


@pytest.mark.parametrize("name", ["r", "modules_to_save", "target_modules", "quantization_config"])
def test_names_of_a_lora_config_are_answered(name: str) -> None:
    """Those of peft's LoraConfig, where they are no keys here, and are in no list above."""
    error = unknown_key("f.yaml", f"lora_config.{name}", ["x"])
    assert "lora." in error.what or "no weights are quantized" in error.what


@pytest.mark.parametrize(("word", "name"), [("partitoin", "partition"), ("xyz", None), ("", None)])
def test_closest(word: str, name: str | None) -> None:
    assert closest(word, ["partition", "account", "qos"]) == name
