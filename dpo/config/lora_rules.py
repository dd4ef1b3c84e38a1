"""Rules between the keys of `lora`, and of `reference.adapter`, which belongs to them."""

import re
from collections.abc import Iterator
from dataclasses import fields

from dpo.config.fields import Config, ReferenceConfig
from dpo.config.lora_fields import LoraConfig
from dpo.config.problem import Problem

RANKS = 2**16
"""A rank is below it; a layer with so many inputs is yet to come."""
_LISTS = ("target_modules", "target_parameters", "exclude_modules")


def lora_problems(config: Config) -> Iterator[Problem]:
    """Yields what is wrong with the keys of `lora` and with `reference.adapter`."""
    yield from _problems_without_adapters(config.lora)
    yield from _list_problems(config.lora)
    yield from _quantized_problems(config.lora)
    yield from _reference_problems(config.reference, config.lora)


def _problems_without_adapters(lora: LoraConfig) -> Iterator[Problem]:
    """Yields keys that say how adapters are, where there are none."""
    if lora.rank is not None or lora.path is not None:
        return
    for name in (field.name for field in fields(lora)):
        value = getattr(lora, name)
        if value is not None and value is not False:
            what = f"there are no adapters, since lora.rank and lora.path are null, got {_shown(value)}"
            yield Problem((f"lora.{name}",), what, "null, or lora.rank (such as 16), or lora.path")


def _list_problems(lora: LoraConfig) -> Iterator[Problem]:
    """Yields lists without names, and texts that are no patterns."""
    for name in _LISTS:
        value = getattr(lora, name)
        if value == []:
            none = "all-linear or null" if name == "target_modules" else "null"
            yield Problem((f"lora.{name}",), "names nothing, got an empty list", f"{none}, or a list of names")
        for word in [value] if isinstance(value, str) else value or []:
            fault = _fault_of_pattern(word)
            if fault and name != "target_parameters":
                yield Problem((f"lora.{name}",), f"{word!r} is no pattern: {fault}", "a name or a regular expression")


def _quantized_problems(lora: LoraConfig) -> Iterator[Problem]:
    """Yields quantized weights beside adapters of single parameters, which peft adds to weights that are not."""
    if lora.quantize and lora.target_parameters:
        what = f"with lora.target_parameters no weights are quantized, got {lora.quantize}"
        yield Problem(("lora.quantize", "lora.target_parameters"), what, "null, or lora.target_parameters null")


def _fault_of_pattern(word: str) -> str | None:
    try:
        re.compile(word)
    except re.error as failure:
        return str(failure)
    return None


def _reference_problems(reference: ReferenceConfig, lora: LoraConfig) -> Iterator[Problem]:
    """Yields a `reference.adapter` that chooses nothing."""
    if reference.adapter == "start":
        return
    if reference.path is not None:
        what = f"the reference is the model of reference.path, got {reference.adapter}"
        yield Problem(("reference.adapter", "reference.path"), what, "start, or reference.path null")
    elif lora.path is None:
        what = f"without lora.path the policy starts as its base, which is the reference, got {reference.adapter}"
        yield Problem(("reference.adapter", "lora.path"), what, "start, or the adapters to start from in lora.path")


def _shown(value: object) -> str:
    """Returns a value as YAML has it."""
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return "true" if value is True else str(value)
