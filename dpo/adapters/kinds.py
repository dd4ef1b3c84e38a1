"""The kinds of adapters that peft has and this trainer does not: told by the keys of adapter_config.json, by name.

Each key is on one of the lists below. A key of a kind that is not read must be at its neutral value, and so must a key
that is on no list: what it would mean is not known.
"""

from collections.abc import Mapping
from typing import Any

from dpo.base.errors import UserError

DECIDING = (
    "r", "lora_alpha", "target_modules", "target_parameters", "exclude_modules", "use_rslora", "use_dora",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "ensure_weight_tying",
)  # fmt: skip
"""Keys that decide which adapters there are."""
TELLING = (
    "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "runtime_config",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size",
)  # fmt: skip
"""Keys that decide nothing: where the adapters come from, what was for their training alone, what each layer tells by
itself (whether its weight is transposed), and sizes of the kinds below."""
KINDS: Mapping[str, str] = {
    "lora_bias": "a bias of each adapter",
    "trainable_token_indices": "trained rows of the embeddings",
    "layer_replication": "layers that are repeated",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "layers of Megatron",
    "loftq_config": "LoftQ",
    "eva_config": "EVA",
    "corda_config": "CorDA",
    "lora_ga_config": "LoRA-GA",
}
"""Key -> the kind of adapters that it makes, unless it is null, false or empty."""
_STARTS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "eva": "EVA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
    "mica": "MiCA",
}
"""Beginning of a value of init_lora_weights -> the kind of start, which changes the base or what is trained."""
_PLAIN_STARTS = (True, False, None, "gaussian", "default", "orthogonal")
"""Values of init_lora_weights that leave the base as it is: the file has what became of them."""


def check_kind(place: str, settings: Mapping[str, Any]) -> None:
    """Raises UserError where adapters are of another kind than LoRA as it is here.

    Args:
        place: the file, for errors.
        settings: the content of adapter_config.json.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        found = "is missing" if kind is None else f"adapters of the kind {kind} are not supported"
        raise UserError(f"{place}: peft_type", found, "LORA")
    _check_words(place, settings)
    for key, value in settings.items():
        if key in KINDS and not _is_neutral(value):
            what = f"{KINDS[key]} is not supported, got {_shown(value)}"
            raise UserError(f"{place}: {key}", what, "null, as in plain LoRA")
        if key not in (*DECIDING, *TELLING, *KINDS, *_WORDS) and not _is_neutral(value):
            raise UserError(f"{place}: {key}", f"is an unknown key, got {_shown(value)}", "null, as in plain LoRA")


_WORDS = ("peft_type", "task_type", "bias", "init_lora_weights")


def _check_words(place: str, settings: Mapping[str, Any]) -> None:
    """Raises UserError for a word that means another kind; see `check_kind`."""
    task, bias, start = (settings.get(key) for key in ("task_type", "bias", "init_lora_weights"))
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{place}: task_type", f"the task {_shown(task)} is not supported", "CAUSAL_LM, null")
    if bias not in (None, "none"):
        raise UserError(f"{place}: bias", f"adapters with trained biases are not supported, got {_shown(bias)}", "none")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_STARTS):
        name = next((name for word, name in _STARTS.items() if str(start).lower().startswith(word)), None)
        what = f"adapters that start as {name or _shown(start)} are not supported"
        valid = "true, false, gaussian, orthogonal; peft converts others where it saves them"
        raise UserError(f"{place}: init_lora_weights", what, valid)


def _is_neutral(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
