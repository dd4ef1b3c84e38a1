"""The texts of the page of one run: answers over time, config, code and machines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np

from dpo.config import Config, SourceConfig
from dpo.config.keys import changed_settings, defaults_of
from dpo.report.record import Record
from dpo.report.scales import value_text
from dpo.terminal.console import harmless

MOST_PROMPTS, MOST_ANSWERS, MOST_CHARACTERS = 8, 6, 1500
"""Prompts that are shown, answers of each, and characters of a text."""

# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerHistory:
    """A prompt, the reference's answer, and the policy's answers over time."""

    prompt: str
    reference: str
    policy: tuple[tuple[int, str], ...]
    """(step, answer)."""


def answers_over_time(record: Record) -> list[AnswerHistory]:
    """Returns the first MOST_PROMPTS prompts with at most MOST_ANSWERS answers each, from first to last step."""
    steps = list(record.answers)
    if not steps:
        return []
    chosen = sorted({steps[i] for i in np.linspace(0, len(steps) - 1, MOST_ANSWERS).round().astype(int)})
    by_prompt: dict[str, list[tuple[int, Mapping[str, str]]]] = {}
    for step in chosen:
        for row in record.answers[step]:
            by_prompt.setdefault(row["prompt"], []).append((step, row))
    return [
        AnswerHistory(
            _cut(prompt),
            _cut(rows[-1][1]["reference"]),
            tuple((step, _cut(row["policy"])) for step, row in reversed(rows)),
        )
        for prompt, rows in list(by_prompt.items())[:MOST_PROMPTS]
    ]


def _cut(text: str) -> str:
    """Returns a text that cannot steer a terminal or browser, cut after MOST_CHARACTERS."""
    return harmless(text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …")


# --- config and code --------------------------------------------------------------------------------------------------


def config_rows(record: Record) -> list[tuple[str, str, str]]:
    """Returns (key, value, default) of the keys of the config that differ from the defaults."""
    defaults = default_values()
    return [
        (key, _value(value), _value(defaults[key]) if key in defaults else "required")
        for key, value in record.config.items()
        if key not in defaults or _value(value) != _value(defaults[key])
    ]


def default_values() -> dict[str, Any]:
    """Returns SECTION.KEY -> default of every key that has one."""
    sections = get_type_hints(Config).items()
    return {f"{section}.{key}": value for section, cls in sections for key, value in defaults_of(cls).items()}


def _value(value: Any) -> str:
    """Returns a value as in YAML, on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        given = changed_settings(SourceConfig, value)  # else data.train would be mostly defaults
        return f"{{{', '.join(f'{key}: {_value(item)}' for key, item in given.items())}}}"
    return value_text(value)


def origin_rows(record: Record, devices: str) -> list[tuple[str, str]]:
    """Returns (name, text) of the code and machines of the last start, and the number of starts.

    Args:
        record: the run.
        devices: those of the last start, as text.
    """
    if not record.starts:
        return []
    last = record.starts[-1]
    names = ("version", "commit", "dirty", "python", "torch", "transformers", "datasets", "ranks", "hosts", "started")
    known = [(name, last[name]) for name in names if name in last]
    rows = [(name, _value(value)) for name, value in known if value is not None and value is not False]
    return [*rows, ("devices", devices), ("starts", str(len(record.starts)))]
