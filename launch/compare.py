"""Compares runs in a table: `python -m launch.compare RUN... [--sort NAME] [--json]`.

It reads run folders only, so it works on a laptop, while jobs run, and for interrupted runs. It also rewrites the
entries of the runs in TensorBoard's HParams tab, with the keys that differ as columns.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.base.errors import UserError
from dpo.board.hparams import write_entry
from dpo.board.values import Value, flat
from dpo.board.words import PAIR_METRICS, words_of
from dpo.command.exits import run_program
from dpo.command.line import Parser, parse_arguments, with_quiet
from dpo.config import SourceConfig
from dpo.config.effects import CHANGING, NEUTRAL
from dpo.config.keys import changed_settings
from dpo.config.strict_yaml import read_yaml_file
from dpo.run_folder.files import CONFIG, FINAL, JOBS, LAST_STEPS, PROVENANCE, TENSORBOARD, is_step, read_metrics
from dpo.terminal.console import harmless, in_one_line, say, warn

DESCRIPTION = """Compares runs: the config keys that differ, the number of steps, and the newest metrics; the run with
the best evaluation comes first. Also writes the runs' entries for TensorBoard's HParams tab, with the same keys."""

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
"""Metrics of the table, without eval/ or train/."""


@dataclass(frozen=True)
class RunFacts:
    """The config, state and metrics that a run folder holds."""

    folder: Path
    config: Mapping[str, Value]
    """SECTION.KEY -> value; keys that are null are absent."""
    is_done: bool
    """The folder final/ exists."""
    step: int
    """Number of updates in metrics.jsonl."""
    last_step: int | None
    """Number of updates of the whole run; None: not recorded."""
    metrics: Mapping[str, float]
    """train/...: means over the last `LAST_STEPS` steps; eval/...: of the newest evaluation."""


# --- read ------------------------------------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> list[RunFacts]:
    """Reads the run folders among `folders`, and warns of others. Raises UserError if a folder does not exist or none
    is a run folder.
    """
    missing = [folder for folder in folders if not folder.exists()]
    if missing:
        raise UserError("command line: RUN", f"no such folder: {missing[0]}", f"a folder with a {CONFIG}")
    run_folders = {folder.resolve(): folder for folder in folders if (folder / CONFIG).is_file()}
    others = [str(folder) for folder in folders if folder.resolve() not in run_folders and folder.name != JOBS]
    if run_folders and others:
        warn(f"skipped, without a {CONFIG}: {', '.join(others)}")
    if not run_folders:
        raise UserError("command line: RUN", f"none of the folders given has a {CONFIG}", "run folders, runs/sweep/*")
    return [read_run(folder) for folder in run_folders.values()]


def read_run(folder: Path) -> RunFacts:
    """Reads the config, state and metrics of a run folder. Raises UserError or RunError if a file in it is broken."""
    config = read_yaml_file(str(folder / CONFIG))
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        raise UserError(str(folder / CONFIG), "is not a config", "the file as a run wrote it")
    values = flat(config)
    lines = read_metrics(folder)
    steps = [line for line in lines if is_step(line)]
    evaluations = [line for line in lines if "eval/loss" in line]
    metrics = {name: metric for name, metric in (evaluations or [{}])[-1].items() if name != "step"} | _means(steps)
    step, is_done = int(steps[-1]["step"]) if steps else 0, (folder / FINAL).is_dir()
    return RunFacts(folder, values, is_done, step, step if is_done else _last_step(folder, values), metrics)


def _means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    last = steps[-LAST_STEPS:]
    names = dict.fromkeys(name for line in last for name in line if name != "step")
    return {name: statistics.fmean(line[name] for line in last if name in line) for name in names}


def _last_step(folder: Path, config: Mapping[str, Value]) -> int | None:
    """Returns train.steps, or for train.epochs the number that the run recorded once it knew its pairs, or None."""
    path, steps = folder / PROVENANCE, config.get("train.steps")
    if isinstance(steps, int) or not path.is_file():
        return steps if isinstance(steps, int) else None
    try:
        last_step: int | None = json.loads(path.read_text(encoding="utf-8"))[-1]["last_step"]
        return last_step
    except json.JSONDecodeError as failure:
        raise UserError(str(path), f"broken: {failure}", "the file as a run wrote it") from failure


# --- compare ---------------------------------------------------------------------------------------------------------


def differing(runs: Sequence[RunFacts]) -> list[str]:
    """Returns the config keys whose values differ between runs, in the order of the config, without those that
    do not change the result."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if key not in NEUTRAL and len({run.config.get(key) for run in runs}) > 1]


def best_metric(runs: Sequence[RunFacts], keys: Sequence[str]) -> str | None:
    """Returns the metric by which runs are sorted by default, or None if they have none. Losses are compared only
    between runs with the same loss section.
    """
    is_one_loss = not any(key.startswith("loss.") for key in keys)
    wanted = [*(["eval/loss"] if is_one_loss else []), "eval/rewards/accuracies", "eval/loss", "train/loss"]
    return next((name for name in wanted if any(name in run.metrics for run in runs)), None)


def ordered(runs: Sequence[RunFacts], name: str) -> list[RunFacts]:
    """Sorts runs by a metric, the best first (the lowest loss, the highest of other metrics), or by a config key, the
    lowest first. Runs without a value come last. Raises UserError if no run has one.
    """
    known = [run for run in runs if name in run.metrics or name in run.config]
    if not known:
        metrics = dict.fromkeys(metric for run in runs for metric in run.metrics)
        raise UserError(
            "command line: --sort", f"no run has {name!r}", f"a config key, loss.beta, or {', '.join(metrics)}"
        )
    if name in known[0].metrics:
        words = words_of(name)
        sign = 1 if words is not None and words.lower_is_better else -1
        known.sort(key=lambda run: sign * run.metrics.get(name, 0.0))
    else:
        known.sort(key=lambda run: run.config[name])
    return known + [run for run in runs if run not in known]


def parent_of(runs: Sequence[RunFacts]) -> Path:
    """Returns the deepest folder that contains all runs; for a single run its own folder."""
    folders = [run.folder.resolve() for run in runs]
    return folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.parent for folder in folders]))


def name_of(run: RunFacts, parent: Path) -> str:
    """Returns the path of a run folder relative to `parent`, or its name if it is `parent` itself."""
    folder = run.folder.resolve()
    return folder.name if folder == parent else str(folder.relative_to(parent))


# --- print -----------------------------------------------------------------------------------------------------------


def table_of(runs: Sequence[RunFacts], keys: Sequence[str]) -> Table:
    """Builds the table: two lines per run, with the metrics of its newest evaluation and of its last training steps."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold", max_width=40)
    table.add_column("steps")
    for key in keys:
        table.add_column(Text(in_one_line(key)), overflow="fold", max_width=24)
    table.add_column("")
    for heading in (*(PAIR_METRICS[name].short for name in SHOWN), "pairs/s"):
        table.add_column(heading, justify="right")
    parent = parent_of(runs)
    for run in runs:
        about = [in_one_line(name_of(run, parent)), _progress(run), *(_cell(key, run.config.get(key)) for key in keys)]
        for part in [part for part in ("eval", "train") if f"{part}/loss" in run.metrics] or [""]:
            metrics = [_number(run.metrics.get(f"{part}/{name}")) for name in (*SHOWN, "pairs_per_second")]
            table.add_row(*(Text(harmless(text)) for text in about), part, *metrics)
            about = [""] * len(about)
    return table


def _progress(run: RunFacts) -> str:
    if run.is_done:
        return f"{run.step}, done"
    return f"{run.step} of {run.last_step}" if run.last_step is not None else f"{run.step}, not done"


def _cell(key: str, value: Value | None) -> str:
    """Returns the value of a key; of the sources of a set their paths, a line each."""
    is_set = key in ("data.train", "data.eval") and value is not None
    return "\n".join(map(in_one_line, map(_source, json.loads(str(value))))) if is_set else _text(value)


def _text(value: Value | None) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _source(source: Mapping[str, Any]) -> str:
    """Returns the path of a source, and its other settings that are not at their defaults."""
    settings = changed_settings(SourceConfig, source)
    return " ".join([str(settings.pop("path")), *(f"{name}={value}" for name, value in settings.items())])


def _number(metric: float | None) -> str:
    return "" if metric is None else f"{metric:.4g}"


def as_json(runs: Sequence[RunFacts], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the comparison for programs: all metrics of each run, and the config keys that differ."""
    return [
        {
            "run": str(run.folder),
            "done": run.is_done,
            "step": run.step,
            "last_step": run.last_step,
            "config": {key: run.config.get(key) for key in keys},
            "metrics": dict(run.metrics),
        }
        for run in runs
    ]


# --- for TensorBoard -------------------------------------------------------------------------------------------------


def write_entries(runs: Sequence[RunFacts], keys: Sequence[str]) -> None:
    """Rewrites the HParams entry of each run, with the keys that differ as columns, and prints how to see them."""
    boards = [run for run in runs if (run.folder / TENSORBOARD).is_dir()]
    written = 0
    for run, values in zip(boards, comparable([run.config for run in boards], keys), strict=True):
        part = "eval" if "eval/loss" in run.metrics else "train"
        try:
            write_entry(run.folder / TENSORBOARD, part, values, keys or CHANGING)
            written += 1
        except OSError as failure:  # for example in a colleague's run folder; the table does not need it
            warn(f"no entry for TensorBoard's HParams tab in {run.folder}: {failure.strerror}")
    if written:
        count = f"{written} run{'s' if written > 1 else ''}"
        say(f"HParams entries of {count} written; to see them, start: tensorboard --logdir {_shown(parent_of(runs))}")


def _shown(folder: Path) -> Path:
    """Returns a folder relative to the working directory, if it lies below it."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def comparable(configs: Sequence[Mapping[str, Value]], keys: Sequence[str]) -> Iterator[dict[str, Value]]:
    """Yields the configs with text in place of values of a key that has several types: a column has one type."""
    mixed = [key for key in keys if len({_kind(config.get(key)) for config in configs}) > 1]
    for config in configs:
        yield {**config, **{key: _text(config.get(key)) for key in mixed}}


def _kind(value: Value | None) -> type:
    return float if type(value) is int else type(value)


# --- the program -----------------------------------------------------------------------------------------------------


def make_parser(prog: str = "python -m launch.compare") -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(prog, description=DESCRIPTION, epilog=f"example: {prog} runs/sweep/*", allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder; runs/sweep/* names many")
    about = "a metric, eval/rewards/margins, or a config key, loss.beta (default: eval/loss, or eval/rewards/accuracies"
    about += " where runs differ in their loss)"
    parser.add_argument("--sort", metavar="NAME", help=about)
    parser.add_argument("--json", action="store_true", help="print JSON with all metrics in place of the table")
    return with_quiet(parser)


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """Returns the arguments in `words`, by default this process's own. Raises UserError where they are wrong, and
    SystemExit(0) after --help.
    """
    return parse_arguments(parser or make_parser(), words)


def main() -> None:
    """Compares runs: `python -m launch.compare`."""
    arguments = read_arguments()
    runs = read_runs(arguments.runs)
    keys = differing(runs)
    by = arguments.sort or best_metric(runs, keys)
    runs = ordered(runs, by) if by else runs
    if arguments.json:
        print(json.dumps(as_json(runs, keys), indent=1))
    else:
        # Wider than any terminal, which then wraps long lines; a table that fits would truncate metrics.
        Console(highlight=False, width=10_000).print(table_of(runs, keys))
        print(f"sorted by {in_one_line(by or 'nothing')}; train: mean of the last {LAST_STEPS} steps")
    write_entries(runs, keys)


if __name__ == "__main__":
    sys.exit(run_program(main))
