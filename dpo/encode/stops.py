"""The stop tokens of a model: the tokens after which generation ends, and with which an answer ends in training.

They are the tokenizer's EOS and every `eos_token_id` of config.json and generation_config.json. Many chat models end a
turn with another token than the tokenizer's EOS (Gemma: <end_of_turn>, Llama 3: <|eot_id|>), which only these files
name.
"""

import json
from pathlib import Path
from typing import Any

from dpo.base.errors import UserError
from dpo.hub.snapshots import cached_snapshot

GENERATION_CONFIG = "generation_config.json"


def model_stop_ids(model_config: Any, path: str | None) -> tuple[int, ...]:
    """Returns the stop tokens of a model, each once: of its config.json, then of its generation_config.json.

    Args:
        model_config: the transformers config of the model.
        path: the model's folder or hub id; a repository is read from the hub's cache alone, without a request. None:
            the config alone.

    Raises:
        UserError: generation_config.json is no JSON object, or its eos_token_id is no token.
    """
    folder = None if path is None else Path(path) if Path(path).is_dir() else cached_snapshot(path)
    generation = {} if folder is None else _read(folder / GENERATION_CONFIG)
    configured = _listed(getattr(model_config, "eos_token_id", None))
    return tuple(dict.fromkeys([*configured, *_listed(generation.get("eos_token_id"))]))


def stop_ids(tokenizer: Any, of_model: tuple[int, ...]) -> tuple[int, ...]:
    """Returns all stop tokens, each once: the tokenizer's EOS first, which is appended to texts, then the model's."""
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *of_model]))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(str(path), f"broken JSON: {error}", "the generation_config.json of the model") from error
    if not isinstance(content, dict):
        raise UserError(str(path), "no JSON object", "the generation_config.json of the model")
    if not all(isinstance(number, int) for number in _listed(content.get("eos_token_id"))):
        raise UserError(str(path), f"eos_token_id is {content['eos_token_id']!r}", "a token id, or a list of them")
    return content


def _listed(eos: Any) -> list[int]:
    return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
