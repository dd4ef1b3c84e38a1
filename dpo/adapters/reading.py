"""Reads adapter_config.json of a folder of adapters in peft's form.

Each value is checked, and adapters of another kind are refused by the name of the key (`kinds.py`), before any weights
are read. Whether the adapters fit the model is seen by their tensors.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpo.adapters.kinds import check_kind
from dpo.adapters.spec import ALL_LINEAR, AdapterSpec
from dpo.base.errors import UserError
from dpo.config.lora_rules import RANKS
from dpo.config.reading import fit
from dpo.hub.files import ADAPTER_CONFIG, ADAPTER_TENSORS, CONFIG_FILE

__all__ = ["ADAPTER_CONFIG", "read_notes", "read_spec"]
QUANTIZE = "quantize"
"""The key of `lora.quantize` in the metadata of adapter_model.safetensors; adapter_config.json has no place for it."""
PICKLED = "adapter_model.bin"
"""The file of adapters in torch's own form, which can hold code."""


def read_spec(folder: Path) -> AdapterSpec:
    """Returns the adapters that a folder holds.

    Raises:
        UserError: the folder holds none; its adapter_config.json cannot be read, has a wrong value, or is of another
            kind than LoRA; or there is no file of tensors.
    """
    path, settings = _read_settings(folder)
    check_kind(str(path), settings)
    given = {key: _read(path, settings, key, hint) for key, hint in _TYPES.items()}
    _check_numbers(path, given)
    _check_targets(path, given)
    _check_tensors(folder)
    return AdapterSpec(
        rank=given["r"],
        alpha=given["lora_alpha"],
        target_modules=_targets(given["target_modules"]),
        target_parameters=tuple(given["target_parameters"] or ()),
        exclude_modules=_words(given["exclude_modules"]),
        rslora=bool(given["use_rslora"]),
        dora=bool(given["use_dora"]),
        rank_pattern=given["rank_pattern"] or {},
        alpha_pattern=given["alpha_pattern"] or {},
        layers_to_transform=_listed(given["layers_to_transform"]) or None,
        layers_pattern=_listed(given["layers_pattern"]) or None,
        trained_modules=tuple(given["modules_to_save"] or ()),
        ties=bool(given["ensure_weight_tying"]),
        quantize=_read_quantize(folder / ADAPTER_TENSORS),
        of_peft=True,
        folder=folder,
    )


def read_notes(folder: Path, base: str) -> list[str]:
    """Returns a line for each setting of a folder of adapters that is not taken as it stands: dropout, and a base that
    is not the model.

    Args:
        folder: the adapters, which `read_spec` has accepted.
        base: the model that they are put into, as the config names it.
    """
    path, settings = _read_settings(folder)
    dropout, named = settings.get("lora_dropout") or 0, settings.get("base_model_name_or_path")
    notes = [f"{path}: lora_dropout {dropout} is taken as 0: adapters have no dropout here"] if dropout else []
    if isinstance(named, str) and named and not _is_same(named, base):
        notes.append(
            f"{path}: the adapters are for {named}, and model.path is {base}: their tensors decide if they fit"
        )
    return notes


def _is_same(named: str, base: str) -> bool:
    return named == base or (Path(named).exists() and Path(named).resolve() == Path(base).resolve())


# --- values ----------------------------------------------------------------------------------------------------------

_REQUIRED = ("r", "lora_alpha")
_TYPES: Mapping[str, Any] = {
    "r": int,
    "lora_alpha": float,
    "target_modules": str | list[str],
    "target_parameters": list[str],
    "exclude_modules": str | list[str],
    "use_rslora": bool,
    "use_dora": bool,
    "rank_pattern": dict[str, int],
    "alpha_pattern": dict[str, float],
    "layers_to_transform": int | list[int],
    "layers_pattern": str | list[str],
    "modules_to_save": list[str],
    "ensure_weight_tying": bool,
    "lora_dropout": float,
    "fan_in_fan_out": bool,
}


def _read_settings(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """Returns the path and the content of a folder's adapter_config.json. Raises UserError where there is none."""
    path = folder / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise UserError("lora.path", *_without_config(folder)) from failure
    except (OSError, ValueError, RecursionError) as failure:
        raise UserError(str(path), f"not readable as JSON: {failure}", "the file that peft wrote") from failure
    if not isinstance(settings, dict):
        raise UserError(str(path), "holds no JSON object", "the file that peft wrote")
    return path, settings


def _without_config(folder: Path) -> tuple[str, str]:
    """Returns what is wrong with a folder that holds no adapters, and what would be right."""
    if (folder / CONFIG_FILE).is_file():
        return f"{folder} holds a model, not adapters", "a folder of adapters; a model goes to model.path"
    return f"{folder} has no {ADAPTER_CONFIG}", "a folder of adapters in peft's form, or its hub id"


def _read(path: Path, settings: Mapping[str, Any], key: str, hint: Any) -> Any:
    """Returns a value with its type checked; None where it is null or missing, which only some may be."""
    value = settings.get(key)
    if value is None and key not in _REQUIRED:
        return None
    if key not in settings:
        raise _wrong(path, key, "is missing", "the rank" if key == "r" else "a number > 0")
    return fit(value, hint, str(path), key)


def _check_numbers(path: Path, given: Mapping[str, Any]) -> None:
    """Raises UserError for a number that is out of its bounds."""
    ranks = {"r": given["r"]} | _under("rank_pattern", given)
    alphas = {"lora_alpha": given["lora_alpha"]} | _under("alpha_pattern", given)
    for key, rank in ranks.items():
        if not 1 <= rank < RANKS:
            raise _wrong(path, key, f"got {rank}", f"an integer >= 1 and < {RANKS}")
    for key, alpha in alphas.items():
        if alpha <= 0:
            raise _wrong(path, key, f"must be > 0, got {alpha:g}", "a number > 0")
    dropout = given["lora_dropout"] or 0
    if not 0 <= dropout < 1:
        raise _wrong(path, "lora_dropout", f"must be >= 0 and < 1, got {dropout:g}", "a number >= 0 and < 1")
    if any(layer < 0 for layer in _listed(given["layers_to_transform"])):
        raise _wrong(path, "layers_to_transform", "must be >= 0", "numbers of layers, from 0")


def _under(key: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{key}.{name}": number for name, number in (given[key] or {}).items()}


def _check_targets(path: Path, given: Mapping[str, Any]) -> None:
    """Raises UserError where the config names no targets, in a pattern that is none, or in ways that exclude each
    other.
    """
    targets, layers = given["target_modules"], given["layers_to_transform"]
    if not targets and not given["target_parameters"]:
        raise _wrong(path, "target_modules", "names nothing", "names of layers, a pattern of them, or all-linear")
    if isinstance(targets, str) and layers is not None:
        raise _wrong(path, "layers_to_transform", "target_modules is a pattern of whole names", "null, or a list there")
    if given["layers_pattern"] and layers is None:
        raise _wrong(path, "layers_pattern", "layers_to_transform is null", "null, or numbers of layers there")
    texts = {key: given[key] for key in ("target_modules", "exclude_modules") if isinstance(given[key], str)}
    patterns = [*texts.items(), *((key, word) for key in _PATTERNS for word in _listed(given[key]))]
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as failure:
            raise _wrong(path, key, f"{pattern!r} is no pattern: {failure}", "a regular expression") from failure


_PATTERNS = ("rank_pattern", "alpha_pattern", "layers_pattern")
"""Keys whose words are regular expressions."""


def _listed(value: Any) -> tuple[Any, ...]:
    """Returns a value, or a list of them, as a tuple; of None an empty one, and of a mapping the keys."""
    if value is None:
        return ()
    return (value,) if isinstance(value, (int, str)) else tuple(value)


def _read_quantize(path: Path) -> str | None:
    """Returns how the base was quantized for which adapters were trained here (QUANTIZE); None for all others."""
    with opened(path) as file:
        quantize: str | None = (file.metadata() or {}).get(QUANTIZE)
    return quantize


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a file of tensors inside. Raises UserError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as failure:
        what = f"not a readable safetensors file: {failure}"
        raise UserError(str(path), what, "the file as it was saved") from failure


def _check_tensors(folder: Path) -> None:
    """Raises UserError where a folder has no file of tensors that can be read."""
    if (folder / ADAPTER_TENSORS).is_file():
        return
    if not (folder / PICKLED).is_file():
        raise UserError(str(folder), f"has no {ADAPTER_TENSORS}", f"{ADAPTER_CONFIG} and {ADAPTER_TENSORS}")
    command = (
        'python -c "import torch; from safetensors.torch import save_file as save;'
        f" t = torch.load('{folder / PICKLED}', map_location='cpu', weights_only=True);"
        f" save({{n: x.clone().contiguous() for n, x in t.items()}}, '{folder / ADAPTER_TENSORS}')\""
    )
    raise UserError(str(folder), f"has its tensors in {PICKLED}, which can hold code; convert it with: {command}")


def _wrong(path: Path, key: str, what: str, valid: str) -> UserError:
    return UserError(f"{path}: {key}", what, valid)


# --- words -----------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"[\w.]+")


def _targets(value: str | list[str] | None) -> str | tuple[str, ...]:
    """Returns the targets in the words of `AdapterSpec`."""
    return ALL_LINEAR if isinstance(value, str) and value.lower() == ALL_LINEAR else _words(value)


def _words(value: str | list[str] | None) -> str | tuple[str, ...]:
    """Returns peft's names or its pattern as `dpo.adapters.targets` reads them: to peft a text is always a pattern of
    whole names, and what is in a list is always the end of a name.
    """
    if isinstance(value, str):
        return f"(?:{value})" if _NAME.fullmatch(value) else value
    return tuple(word if _NAME.fullmatch(word) else rf"(?:.*\.)?{re.escape(word)}" for word in value or ())
