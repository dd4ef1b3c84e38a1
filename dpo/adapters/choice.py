"""The adapters that a config asks for: by the keys of `lora`, or by the folder that `lora.path` names."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo.adapters.names import EMBEDDINGS
from dpo.adapters.reading import read_notes, read_spec
from dpo.adapters.spec import ALL_LINEAR, AdapterSpec
from dpo.base.errors import InvalidValue, UserError
from dpo.config import Config, LoraConfig, OptimConfig
from dpo.hub.files import ADAPTER_CONFIG, ADAPTERS
from dpo.hub.ids import is_hub_id
from dpo.hub.snapshots import find_snapshot

USUAL_RATES = "5e-6 to 1e-4"
"""Learning rates with which adapters are trained."""


def find_adapters(config: Config) -> AdapterSpec | None:
    """Returns the adapters of a run; None where its whole model is trained. Of a hub repository the files are
    downloaded where the hub's cache lacks them: on a node one rank should get here first.

    Raises:
        UserError: the folder of `lora.path` cannot be used, or another key of `lora` contradicts it.
        RunError: the disk has no room for the download.
    """
    lora = config.lora
    if lora.path is not None:
        spec = read_spec(find_folder(lora.path))
        _check_beside(lora, lora.path, spec)
        return replace(spec, quantize=lora.quantize or spec.quantize)
    return None if lora.rank is None else _by_keys(lora, lora.rank)


def find_folder(path: str) -> Path:
    """Returns the local folder of adapters: `path` itself, or a hub repository's; see `find_adapters`."""
    if Path(path).exists():
        return Path(path)
    if not is_hub_id(path):
        raise UserError("lora.path", f"no such folder: {path}", "a folder of adapters in peft's form, or its hub id")
    try:
        return find_snapshot(path, ADAPTERS)
    except InvalidValue as failure:
        raise failure.at("lora.path") from failure


def find_warnings(config: Config) -> list[str]:
    """Returns lines about adapters that are not trained as the user may think; none where there are no adapters. What
    `find_adapters` refuses must have been refused.
    """
    lora = config.lora
    if lora.path is None and lora.rank is None:
        return []
    notes = read_notes(find_folder(lora.path), config.model.path) if lora.path is not None else []
    if config.optim.lr == OptimConfig.lr:
        what = f"optim.lr {config.optim.lr:g} is that of whole models, with which adapters hardly move"
        notes.append(f"{what}; usual for them: {USUAL_RATES}, as in --optim.lr 1e-5")
    return notes


# --- lora.path -------------------------------------------------------------------------------------------------------


def _check_beside(lora: LoraConfig, path: str, spec: AdapterSpec) -> None:
    """Raises UserError where a key of `lora` is given that contradicts the folder."""
    for key, given, found in _compared(lora, spec):
        if _comparable(given) != _comparable(found):
            what = f"{_shown(given)} is given, and {ADAPTER_CONFIG} of lora.path {path} has {_shown(found)}"
            raise UserError(f"lora.{key}", what, f"null, which takes that of lora.path, or {_shown(found)}")
    trains = any(word.rpartition(".")[2] in EMBEDDINGS for word in spec.trained_modules)
    if lora.train_embeddings is not None and lora.train_embeddings != trains:
        has = f"modules_to_save {_shown(spec.trained_modules)}" if spec.trained_modules else "no modules_to_save"
        what = f"{_shown(lora.train_embeddings)} is given, and {ADAPTER_CONFIG} of lora.path {path} has {has}"
        raise UserError("lora.train_embeddings", what, "null, which takes what lora.path has")


def _compared(lora: LoraConfig, spec: AdapterSpec) -> Iterator[tuple[str, Any, Any]]:
    """Yields each key that is given with its value and that of the folder."""
    keys = ("rank", "alpha", "target_modules", "target_parameters", "exclude_modules", "rslora", "dora")
    for key in keys:
        given = getattr(lora, key)
        if given is not None:
            yield key, given, getattr(spec, key)


def _comparable(value: Any) -> Any:
    """Returns a value such that equal ones are the same choice: names without their order, one name as a list of it."""
    if isinstance(value, str):
        return frozenset([value])
    return frozenset(value) if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    """Returns a value as the config has it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(sorted(value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- keys ------------------------------------------------------------------------------------------------------------


def _by_keys(lora: LoraConfig, rank: int) -> AdapterSpec:
    """Returns the adapters that the keys of `lora` describe."""
    return AdapterSpec(
        rank=rank,
        alpha=2.0 * rank if lora.alpha is None else lora.alpha,
        target_modules=_words(lora.target_modules or ALL_LINEAR),
        target_parameters=tuple(lora.target_parameters or ()),
        exclude_modules=_words(lora.exclude_modules or ()),
        rslora=bool(lora.rslora),
        dora=bool(lora.dora),
        embeddings=bool(lora.train_embeddings),
        quantize=lora.quantize,
    )


def _words(words: str | list[str] | tuple[str, ...]) -> str | tuple[str, ...]:
    return words if isinstance(words, str) else tuple(words)
