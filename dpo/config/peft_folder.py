"""A `model.path` that is a folder of adapters in peft's form: it is taken as `lora.path`, and its base as `model.path`.

The folder of an SFT run with adapters is named as that of any model would be. Only local folders are looked into, since
a config is read without requests; of a repository of the hub `dpo.model.download` tells what to write.
"""

import functools
import json
import os
from dataclasses import replace
from pathlib import Path

from dpo.base.errors import UserError
from dpo.command.rank import is_main
from dpo.config.fields import Config
from dpo.hub.files import ADAPTER_CONFIG, TOKENIZER, is_of_adapters
from dpo.hub.ids import is_hub_id
from dpo.terminal.console import say


def resolve_adapters(config: Config, place: str) -> Config:
    """Returns the config with base and adapters apart where `model.path` is a local folder of adapters, and says so in
    a line; else the config itself.

    Args:
        config: the config, before it is checked.
        place: the file, or `command line`, that gave `model.path`, for errors.

    Raises:
        UserError: the folder names no base, or one that is not there; or `lora.path` names other adapters.
    """
    path = config.model.path
    folder = Path(path)
    if not is_of_adapters(folder):
        return config
    if config.lora.path is not None and Path(config.lora.path).resolve() != folder.resolve():
        what = f"{path} holds adapters, and lora.path names others, {config.lora.path}"
        raise UserError(f"{place}: model.path", what, "the base as model.path, or one of the two folders")
    base = _checked_base(path, place)
    has_tokenizer = config.model.tokenizer is None and not TOKENIZER.missing(folder)
    tokenizer = path if has_tokenizer else config.model.tokenizer
    if is_main(os.environ):
        also = f", model.tokenizer {path}" if has_tokenizer else ""
        _say_once(f"model.path {path} holds adapters: taken as lora.path {path}, model.path {base}{also}")
    model = replace(config.model, path=base, tokenizer=tokenizer)
    return replace(config, model=model, lora=replace(config.lora, path=path))


_say_once = functools.cache(say)
"""Says a line, once per process: `dpo NAME` reads a command line before the program itself does."""


def base_of(folder: Path) -> str | None:
    """Returns the base that a folder of adapters names, a folder or hub id; None where it names none.

    Raises UserError where its adapter_config.json cannot be read.
    """
    path = folder / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise UserError(str(path), f"not readable as JSON: {failure}") from failure
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    return base if isinstance(base, str) and base else None


def _checked_base(path: str, place: str) -> str:
    """Returns the base of the folder of adapters `path`; see `resolve_adapters`."""
    base, key = base_of(Path(path)), f"{place}: model.path"
    remedy = f"the base as model.path, and lora.path {path}"
    if base is None:
        what = f"{path} holds adapters, and its {ADAPTER_CONFIG} has no base_model_name_or_path"
        raise UserError(key, what, remedy)
    if is_of_adapters(Path(base)):
        raise UserError(key, f"{path} holds adapters for {base}, which holds adapters too", remedy)
    if not Path(base).is_dir() and not is_hub_id(base):
        what = f"{path} holds adapters for the model {base}, and there is no such folder"
        raise UserError(key, what, remedy)
    return base
