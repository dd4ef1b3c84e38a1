"""Writes the files of an exported model beside its weights: training changes weights, not the form of the folder.

config.json is that of the model from which the policy started, with its keys and values, so that every program that
could read the start can read the result; only keys change of which training knows better (`changed_keys`). All other
files are copies: tokenizer, chat template, generation config, the model's own code, licence.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo.base.errors import InvalidValue, UserError
from dpo.base.files import naming, write_file
from dpo.config import Config
from dpo.encode.tokenizer import find_tokenizer_folder, has_tokenizer, load_tokenizer
from dpo.hub.files import CONFIG_FILE, licence_files, model_companions, tokenizer_companions
from dpo.model.model_config import is_untied
from dpo.terminal.console import say, warn

TOKENIZER_CONFIG = "tokenizer_config.json"
_ANY_TOKENIZER = "PreTrainedTokenizerFast"
"""The class of a tokenizer that is read from tokenizer.json alone, by the name that all versions of transformers know.
"""


def write_companions(draft: Path, folder: Path, config: Config, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Writes config, tokenizer, code and licence of an exported model.

    Args:
        draft: the folder of the exported model.
        folder: the folder of the model from which the policy started.
        config: names the tokenizer.
        model: the trained model, for its class and config.
        dtype: the dtype of the exported weights.

    Raises:
        UserError: config.json is broken, which it was not at the start of the run.
    """
    settings = _read(folder / CONFIG_FILE)
    _copy(folder, companions_of_model(folder), draft)
    _write(draft / CONFIG_FILE, settings | changed_keys(settings, folder, model, dtype))
    _write_tokenizer(draft, folder, config, names_class=False)
    elsewhere = repositories_of_code(draft)
    if elsewhere:
        say(f"the exported model reads its code from {', '.join(elsewhere)}, as the model at its start does")


def write_companions_of_adapters(draft: Path, folder: Path, config: Config) -> None:
    """Writes tokenizer and licence of exported adapters; the base, which they need, has all other files.

    Args:
        draft: the folder of the adapters.
        folder: the folder of the base.
        config: names the tokenizer.
    """
    _copy(folder, licence_files(_names(folder, nested=False)), draft)
    _write_tokenizer(draft, folder, config, names_class=True)


def companions_of_model(folder: Path) -> list[str]:
    """Returns the paths of the files that a model trained from this one gets: config, generation config, own code and
    licence.
    """
    names = _names(folder, nested=bool(own_code(_read(folder / CONFIG_FILE))))
    return [CONFIG_FILE, *model_companions(names)]


def companions_of_tokenizer(folder: Path) -> list[str]:
    """Returns the paths of a tokenizer's files, its own code included, which is copied with a model's or in `_join`."""
    names = _names(folder, nested=False)
    return [*tokenizer_companions(names), *filter(is_code, names)]


def is_code(name: str) -> bool:
    """Returns whether a file is code of a model or a tokenizer."""
    return name.endswith(".py")


def changed_keys(
    settings: Mapping[str, Any], folder: Path, model: PreTrainedModel, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns the keys of config.json that the exported model has otherwise than its start: the dtype of the weights;
    the class, where the start was a body alone or a model for another task; the tie of head and embedding, where the
    files of the start said otherwise (`is_untied`).

    Args:
        settings: config.json of the start.
        folder: the folder of the start.
        model: the trained model.
        dtype: the dtype of the exported weights.
    """
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in settings] or ["dtype"]
    changed: dict[str, Any] = dict.fromkeys(keys, name)
    trained = type(model).__name__.removeprefix("FSDP")
    if trained not in (settings.get("architectures") or ()) and not _references(settings):
        changed["architectures"] = [trained]
    if is_untied(folder, model.config):
        changed["tie_word_embeddings"] = False
    return changed


def own_code(settings: Mapping[str, Any]) -> list[str]:
    """Returns the classes, `module.Class`, of the folder's own code that a config names."""
    return [reference for reference in _references(settings) if "--" not in reference]


def repositories_of_code(folder: Path) -> list[str]:
    """Returns the other repositories of the hub whose code the configs of a model and of its tokenizer name, sorted. A
    tokenizer's config may be broken: data of token ids is trained on without it.
    """
    named = _references(_read(folder / CONFIG_FILE))
    with suppress(UserError):
        named += _references(_read(folder / TOKENIZER_CONFIG))
    return sorted({name.partition("--")[0] for name in named if "--" in name})


def _references(settings: Mapping[str, Any]) -> list[str]:
    """Returns the classes that a config names in `auto_map`, in the folder or, after `org/name--`, elsewhere."""
    auto_map = settings.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else []
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [name for name in names if isinstance(name, str) and name]


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def _write_tokenizer(draft: Path, folder: Path, config: Config, names_class: bool) -> None:
    """Copies the tokenizer, unless a local folder has none: data in `format: tokens` does not need it.

    Args:
        draft: the folder of the exported model.
        folder: the folder of the model from which the policy started.
        config: names the tokenizer.
        names_class: whether its class is named even where it comes from `folder`: beside no config.json.
    """
    try:
        source = find_tokenizer_folder(config.model.tokenizer or str(folder))
        if has_tokenizer(source):
            _copy(source, tokenizer_companions(_names(source, nested=False)), draft)
            if names_class or not source.samefile(folder):
                _join(draft, source, config)
    except (UserError, InvalidValue) as failure:  # the run used token ids; its model is exported without a tokenizer
        say(f"the exported model has no tokenizer: {failure}")


def _join(draft: Path, source: Path, config: Config) -> None:
    """Makes the tokenizer of another folder independent of that folder: copies its own code, and names its class, which
    without a name would be that of the config.json beside it.
    """
    settings = _read(source / TOKENIZER_CONFIG)
    if own_code(settings):
        code = [name for name in companions_of_tokenizer(source) if is_code(name)]
        taken = [name for name in code if (draft / name).exists()]
        differing = [name for name in taken if (draft / name).read_bytes() != (source / name).read_bytes()]
        if differing:
            warn(f"the exported model has its own {differing[0]}, not that of the tokenizer in {source}")
        _copy(source, [name for name in code if name not in taken], draft)
    elif "tokenizer_class" not in settings:
        name = type(load_tokenizer(str(source), config.model.trust_remote_code)).__name__
        settings["tokenizer_class"] = _ANY_TOKENIZER if name == "TokenizersBackend" else name
        _write(draft / TOKENIZER_CONFIG, settings)


# --- files -----------------------------------------------------------------------------------------------------------


def _names(folder: Path, nested: bool) -> list[str]:
    """Returns the paths of a model folder's files, sorted: those at its top, further chat templates, and the code below
    it where `nested`. Hidden folders and folders of other models are left out.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    names += [path.relative_to(folder).as_posix() for path in folder.glob("additional_chat_templates/*.jinja")]
    return sorted([*names, *(_nested_code(folder) if nested else ())])


def _nested_code(folder: Path) -> list[str]:
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and not (Path(place) / name / CONFIG_FILE).exists()]
        if Path(place) != folder:
            found += [(Path(place) / name).relative_to(folder).as_posix() for name in files if name.endswith(".py")]
    return found


def _copy(folder: Path, names: Sequence[str], draft: Path) -> None:
    """Copies files; a snapshot of the hub's cache holds links, which are followed."""
    for name in names:
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        with naming(draft / name, (folder / name).stat().st_size):
            shutil.copyfile(folder / name, draft / name)


def _read(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, empty where there is no file. Raises UserError where it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as failure:
        raise UserError(str(path), f"broken JSON: {failure}", "a JSON object") from failure
    if not isinstance(content, dict):
        raise UserError(str(path), "no JSON object", "a JSON object")
    return content


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
