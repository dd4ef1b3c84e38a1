"""The runs of a command line: a single run, or with --sweep one run for every combination of values.

`--sweep loss.beta=0.1,0.5 optim.lr=1e-6,5e-7` gives four runs, in folders named beta=0.1,lr=1e-6 to beta=0.5,lr=5e-7.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.base.errors import UserError
from dpo.command.line import replaced, split_options
from dpo.config import Config, load_config
from launch.arguments import Request
from launch.flags import PROG

_LONGEST_NAME = 40
"""Maximum number of characters of a value in the name of a folder."""


@dataclass(frozen=True)
class PlannedRun:
    """A run before it is submitted."""

    dir: Path
    words: tuple[str, ...]
    """The command line of the run."""
    config: Config


def planned_runs(request: Request) -> list[PlannedRun]:
    """Returns all runs of a request. Raises UserError if any config is wrong, or two runs are the same."""
    choices = [parse_choice(text) for text in request.sweep]
    _check_keys([key for key, _ in choices], request.words)
    names = _short_names([key for key, _ in choices])
    runs = []
    for values in itertools.product(*(values for _, values in choices)):
        settings = [(key, value) for (key, _), value in zip(choices, values, strict=True)]
        runs.append(_planned_run(request.words, settings, names))
    _check_distinct(runs)
    return runs


def parse_choice(text: str) -> tuple[str, list[str]]:
    """Parses KEY=VALUE,VALUE,... into (KEY, values). Commas inside brackets belong to a value. Raises UserError."""
    key, equals, rest = text.partition("=")
    values = _split_at_commas(rest)
    if not re.fullmatch(r"\w+\.\w+", key) or not equals or not all(values):
        raise UserError("command line: --sweep", f"got {text!r}", "SECTION.KEY=VALUE,VALUE,...")
    return key, values


def _split_at_commas(text: str) -> list[str]:
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return values


def _check_keys(keys: Sequence[str], words: Sequence[str]) -> None:
    given = {option.key for option in split_options(words)}
    for key in keys:
        if key == "train.run_dir":
            what = "train.run_dir contains the folders of all runs"
            raise UserError("command line: --sweep", what, "other keys")
        if keys.count(key) > 1 or key in given:
            raise UserError("command line: --sweep", f"{key} is given twice", "once, in --sweep")


def _planned_run(words: Sequence[str], settings: Sequence[tuple[str, str]], names: dict[str, str]) -> PlannedRun:
    over = [word for key, value in settings for word in (f"--{key}", value)]
    config = load_config([*words, *over], PROG)
    folder = Path(str(config.train.run_dir))
    if not settings:
        return PlannedRun(folder, tuple(words), config)
    folder /= ",".join(f"{names[key]}={_safe(value)}" for key, value in settings)
    return PlannedRun(folder, tuple(replaced([*words, *over], "train.run_dir", str(folder))), config)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Returns key -> its name in a folder's name: without its section, unless two names would then be equal."""
    tails = [key.partition(".")[2] for key in keys]
    return {key: tail if tails.count(tail) == 1 else key for key, tail in zip(keys, tails, strict=True)}


def _safe(value: str) -> str:
    """Returns a value as part of a folder's name. If characters are replaced or cut, six hex digits of its hash are
    added, so that different values keep different names.
    """
    plain = re.sub(r"[^\w.+-]+", "_", value)[:_LONGEST_NAME]
    return plain if plain == value else f"{plain}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"


def _check_distinct(runs: Sequence[PlannedRun]) -> None:
    for run, other in itertools.combinations(runs, 2):
        if run.config == other.config:
            what = f"{run.dir.name} and {other.dir.name} are the same run"
            raise UserError("command line: --sweep", what, "each value once")


# --- work that the runs of a sweep share ------------------------------------------------------------------------------


def reference_passes(runs: Sequence[PlannedRun]) -> list[tuple[str, ...]]:
    """Returns the command lines of `dpo.reference` that fill the cache before a sweep starts: one for each set of rows
    that its runs need. A single run fills the cache itself; a run whose loss has no reference needs none.
    """
    shared = [run for run in runs if run.config.loss.facts.uses_reference] if len(runs) > 1 else []
    return _first_of_each(shared, _reference_facts)


def prepare_passes(runs: Sequence[PlannedRun]) -> list[tuple[str, ...]]:
    """Returns the command lines of `dpo.prepare`: one for each set of models and data that the runs need."""
    return _first_of_each(
        runs, lambda config: (*_model_facts(config), config.lora.path, config.data, config.train.seed)
    )


def _first_of_each(runs: Sequence[PlannedRun], facts_of: Callable[[Config], tuple[Any, ...]]) -> list[tuple[str, ...]]:
    """Returns the command lines of the first run of each group with equal facts."""
    passes: list[tuple[Any, tuple[str, ...]]] = []
    for run in runs:
        facts = facts_of(run.config)
        if facts not in [known for known, _ in passes]:
            passes.append((facts, run.words))
    return [words for _, words in passes]


def _model_facts(config: Config) -> tuple[Any, ...]:
    return (config.model.path, config.reference.path or config.model.path, config.model.tokenizer or config.model.path)


def _reference_facts(config: Config) -> tuple[Any, ...]:
    """Returns the parts of a config on which the rows of the cache depend. A row that is missing nevertheless is
    computed by the run that needs it.
    """
    sources = [dataclasses.replace(source, holdout=None) for source in (*config.data.train, *config.data.eval)]
    data = dataclasses.replace(config.data, train=sources, eval=[], order="shuffled", num_proc=None)
    precision = (config.model.dtype, config.parallel.compute_dtype, config.parallel.tf32)
    return (*_model_facts(config)[1:], _reference_adapters(config), *precision, config.reference.cache_dir, data)


def _reference_adapters(config: Config) -> str | None:
    """Returns the adapters that the reference may have: those with which a run starts, not those that it trains."""
    is_start = config.reference.path is None and config.reference.adapter == "start"
    return config.lora.path if is_start else None
