"""The files of a run folder, as far as they can be read: a page shows a run that is going on or was killed too."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dpo.base.errors import RunError, UserError
from dpo.config.loss_facts import LOSS_FACTS, LossFacts
from dpo.config.strict_yaml import read_yaml_file
from dpo.hub.files import find_config
from dpo.run_folder.evaluations import evaluation_path, evaluation_steps, read_evaluation
from dpo.run_folder.files import ANSWERS, CONFIG, FINAL, METRICS, PROVENANCE, is_step, read_answer_rows, read_metrics

T = TypeVar("T")
Line = Mapping[str, float]
"""A line of metrics.jsonl: metrics by name, and `step`."""
Pairs = Mapping[str, np.ndarray]
"""The arrays of an evaluation, see `dpo.run_folder.evaluations`."""
NOTHING: Mapping[str, Any] = {}
NONE: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Record:
    """What a run folder holds; parts that are missing or broken are empty."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    """SECTION.KEY -> value."""
    config_text: str = ""
    lines: tuple[Line, ...] = ()
    starts: tuple[Mapping[str, Any], ...] = ()
    """The entries of provenance.json, oldest first."""
    answers: Mapping[int, tuple[Mapping[str, str], ...]] = field(default_factory=dict)
    """Step -> `prompt`, `reference` and `policy` of each answer, steps rising."""
    pairs: Mapping[int, Pairs] = field(default_factory=dict)
    """Step -> the values of single pairs, of the first and of the last evaluation."""
    is_done: bool = False
    """The model was exported."""
    faults: tuple[str, ...] = ()
    """What could not be read."""

    @cached_property
    def train(self) -> list[Line]:
        """Returns the lines of training steps."""
        return [line for line in self.lines if is_step(line)]

    @cached_property
    def evals(self) -> list[Line]:
        """Returns the lines of evaluations."""
        return [line for line in self.lines if "eval/loss" in line]

    @property
    def facts(self) -> LossFacts | None:
        """Returns the facts of the loss; None where the config does not tell it."""
        return LOSS_FACTS.get(self.config.get("loss.name", ""))

    @property
    def begins_at_reference(self) -> bool:
        """Returns whether the policy started from the reference, so that all rewards were 0; True where the config does
        not tell.
        """
        has_reference = self.facts is None or self.facts.rewards == "implicit"
        return has_reference and self.config.get("reference.path") in (None, self.config.get("model.path"))

    @property
    def last_step(self) -> int | None:
        """Returns the number of steps of the whole run; None where it is not known."""
        for steps in (*(start.get("last_step") for start in reversed(self.starts)), self.config.get("train.steps")):
            if isinstance(steps, int):
                return steps
        return None

    @cached_property
    def step(self) -> int:
        """Returns the number of steps that were made."""
        return max((int(line["step"]) for line in self.train), default=0)


@dataclass(frozen=True)
class Reader:
    """Reads the parts of a run folder, and remembers what could not be read."""

    faults: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[[], T], what: str, otherwise: T) -> T:
        """Returns what `read` returns; `otherwise` where the file does not exist, or is broken, which is a fault."""
        try:
            return read()
        except FileNotFoundError:
            return otherwise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RunError) as failure:
            self.faults.append(f"{what} cannot be read: {failure}")
            return otherwise

    def pairs(self, folder: Path) -> dict[int, Pairs]:
        """Returns the values of single pairs, of the first and of the last evaluation."""
        steps = evaluation_steps(folder)
        ends = sorted({*steps[:1], *steps[-1:]})
        found = {step: self.attempt(partial(_pairs, folder, step), _name(folder, step), NOTHING) for step in ends}
        return {step: arrays for step, arrays in found.items() if arrays}

    def answers(self, folder: Path) -> dict[int, tuple[Mapping[str, str], ...]]:
        """Returns the sampled answers of each evaluation."""
        files = _answer_files(folder / ANSWERS)
        found = {step: self.attempt(partial(_answers, path), f"{ANSWERS}/{path.name}", NONE) for step, path in files}
        return {step: rows for step, rows in found.items() if rows}


def read_record(folder: Path) -> Record:
    """Reads a run folder. Where a file is missing or broken its part is empty; `Record.faults` names broken files."""
    reader = Reader()
    config = reader.attempt(lambda: _config(folder / CONFIG), CONFIG, NOTHING)
    text = reader.attempt(lambda: (folder / CONFIG).read_text(encoding="utf-8", errors="replace"), CONFIG, "")
    lines = reader.attempt(lambda: tuple(map(_finite, read_metrics(folder))), METRICS, NONE)
    starts = reader.attempt(lambda: _starts(folder / PROVENANCE), PROVENANCE, NONE)
    pairs, answers = reader.pairs(folder), reader.answers(folder)
    is_done = find_config(folder / FINAL) is not None
    return Record(folder, config, text, lines, starts, answers, pairs, is_done, tuple(reader.faults))


def is_run(folder: Path) -> bool:
    """Returns whether a folder is a run folder: it has a config or metrics."""
    return (folder / CONFIG).is_file() or (folder / METRICS).is_file()


# --- the files --------------------------------------------------------------------------------------------------------


def _config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    tree = read_yaml_file(str(path))
    if not isinstance(tree, dict) or not all(isinstance(section, dict) for section in tree.values()):
        raise UserError(str(path), "is not a config", "the file as a run wrote it")
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def _finite(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics that are finite numbers."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _starts(path: Path) -> tuple[Mapping[str, Any], ...]:
    return tuple(dict(start) for start in json.loads(path.read_text(encoding="utf-8")))


def _answer_files(folder: Path) -> list[tuple[int, Path]]:
    """Returns (step, file) of the answers of each evaluation, steps rising."""
    found = [(re.fullmatch(r"step-(\d+)", path.stem), path) for path in folder.glob("step-*.jsonl")]
    return sorted((int(match[1]), path) for match, path in found if match)


def _answers(path: Path) -> tuple[Mapping[str, str], ...]:
    return tuple(read_answer_rows(path))


def _pairs(folder: Path, step: int) -> Pairs:
    """Returns the arrays of an evaluation. Raises OSError or ValueError where the file is broken."""
    arrays = read_evaluation(folder, step)
    sizes = {name: array.shape for name, array in arrays.items() if name != "sources"}
    numbers = all(array.dtype.kind in "fi" for name, array in arrays.items() if name != "sources")
    if len(set(sizes.values())) != 1 or not numbers or "source" not in arrays or "sources" not in arrays:
        raise ValueError(f"it does not hold numbers of the same pairs, but {sizes}")
    source, num_sources = arrays["source"], len(arrays["sources"])
    if source.ndim != 1 or source.dtype.kind != "i" or not np.all((source >= 0) & (source < num_sources)):
        raise ValueError(f"its pairs name other sources than its {num_sources}")
    return arrays


def _name(folder: Path, step: int) -> str:
    return str(evaluation_path(folder, step).relative_to(folder))
