"""What became of runs, side by side: `python -m launch.compare RUN... [--sort NAME] [--json]`.

Reads the run folders alone, so it works on a laptop, beside running jobs, and for runs that were interrupted. It also
writes the runs' entries for TensorBoard's HParams tab again, with the keys that differ as their columns.
"""

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

from dpo.base.command import Parser, parse_arguments, run_program
from dpo.base.console import say, warn
from dpo.base.errors import UserError
from dpo.board.hparams import KEYS, Value, flat, write_entry
from dpo.config.strict_yaml import read_yaml_file
from dpo.run.files import CONFIG, FINAL, LAST_STEPS, PROVENANCE, TENSORBOARD, read_metrics

DESCRIPTION = """Compares runs: the config keys that differ, how far they came, and their newest metrics; the best
evaluation stands first. Also writes the runs' entries for TensorBoard's HParams tab, with the keys that differ."""

SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "acc",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
}
"""The metrics of the table, by what follows eval/ or train/ in their names, and how they are headed."""


@dataclass(frozen=True)
class RunFacts:
    """What a run folder says."""

    folder: Path
    config: Mapping[str, Value]
    """SECTION.KEY -> value; null ones are absent."""
    is_done: bool
    """final/ is there."""
    step: int
    """Updates that metrics.jsonl tells of."""
    last_step: int | None
    """Of the whole run; null: nobody wrote it down."""
    metrics: Mapping[str, float]
    """train/...: means over the last steps; eval/...: of the newest evaluation."""


# --- read ------------------------------------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> list[RunFacts]:
    """The runs among folders; what is no run is left out, and said. Raises UserError if there is none."""
    missing = [folder for folder in folders if not folder.exists()]
    if missing:
        raise UserError("command line: RUN", f"no such folder: {missing[0]}", "a run folder")
    found = {folder.resolve(): folder for folder in folders if (folder / CONFIG).is_file()}
    others = [str(folder) for folder in folders if folder.resolve() not in found]
    if found and others:
        warn(f"left out, since there is no {CONFIG} in it: {', '.join(others)}")
    if not found:
        raise UserError("command line: RUN", f"none of the folders given has a {CONFIG}", "run folders, runs/sweep/*")
    return [read_run(folder) for folder in found.values()]


def read_run(folder: Path) -> RunFacts:
    """A run folder's config, state and metrics. Raises UserError or RunError where a file in it is broken."""
    config = read_yaml_file(str(folder / CONFIG))
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        raise UserError(str(folder / CONFIG), "is no config", "what a run writes there")
    values = flat(config)
    lines = read_metrics(folder)
    steps = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    metrics = {name: metric for name, metric in (evaluations or [{}])[-1].items() if name != "step"} | _means(steps)
    step, is_done = int(steps[-1]["step"]) if steps else 0, (folder / FINAL).is_dir()
    return RunFacts(folder, values, is_done, step, step if is_done else _last_step(folder, values), metrics)


def _means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    last = steps[-LAST_STEPS:]
    names = [name for name in last[-1] if name != "step"] if last else []
    return {name: statistics.fmean(line[name] for line in last if name in line) for name in names}


def _last_step(folder: Path, config: Mapping[str, Value]) -> int | None:
    """train.steps, or for epochs what the run wrote down when it knew its pairs."""
    path, steps = folder / PROVENANCE, config.get("train.steps")
    if isinstance(steps, int) or not path.is_file():
        return steps if isinstance(steps, int) else None
    try:
        last_step: int | None = json.loads(path.read_text(encoding="utf-8"))[-1]["last_step"]
        return last_step
    except json.JSONDecodeError as failure:
        raise UserError(str(path), f"broken: {failure}", "what a run writes there") from failure


# --- compared --------------------------------------------------------------------------------------------------------


def differing(runs: Sequence[RunFacts]) -> list[str]:
    """The config keys whose values are not the same in all runs, in the order of the config."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if key != "train.run_dir" and len({run.config.get(key) for run in runs}) > 1]


def best_metric(runs: Sequence[RunFacts], keys: Sequence[str]) -> str | None:
    """By what runs are sorted unless told otherwise; losses that are not one and the same do not compare."""
    is_one_loss = not any(key.startswith("loss.") for key in keys)
    wanted = [*(["eval/loss"] if is_one_loss else []), "eval/rewards/accuracies", "eval/loss", "train/loss"]
    return next((name for name in wanted if any(name in run.metrics for run in runs)), None)


def ordered(runs: Sequence[RunFacts], name: str) -> list[RunFacts]:
    """By a metric, the best first (losses: the smallest; others: the greatest), or by a config key, the smallest first.

    Runs without it come last. Raises UserError where no run has it.
    """
    known = [run for run in runs if name in run.metrics or name in run.config]
    if not known:
        metrics = dict.fromkeys(metric for run in runs for metric in run.metrics)
        raise UserError(
            "command line: --sort", f"no run has {name!r}", f"a config key, loss.beta, or {', '.join(metrics)}"
        )
    if name in known[0].metrics:
        sign = 1 if name.split("/")[-1].startswith("loss") else -1
        known.sort(key=lambda run: sign * run.metrics.get(name, 0.0))
    else:
        known.sort(key=lambda run: run.config[name])
    return known + [run for run in runs if run not in known]


def parent_of(runs: Sequence[RunFacts]) -> Path:
    """The folder that all runs lie in; of a single one, itself."""
    folders = [run.folder.resolve() for run in runs]
    return folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.parent for folder in folders]))


def name_of(run: RunFacts, parent: Path) -> str:
    """The run's folder, without what it shares with the others."""
    folder = run.folder.resolve()
    return folder.name if folder == parent else str(folder.relative_to(parent))


# --- shown -----------------------------------------------------------------------------------------------------------


def table_of(runs: Sequence[RunFacts], keys: Sequence[str]) -> Table:
    """Two lines a run: its newest evaluation, and the end of its training."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold", max_width=40)
    table.add_column("steps")
    for key in keys:
        table.add_column(key, overflow="fold", max_width=24)
    table.add_column("")
    for heading in (*SHOWN.values(), "pairs/s"):
        table.add_column(heading, justify="right")
    parent = parent_of(runs)
    for run in runs:
        about = [name_of(run, parent), _progress(run), *(_text(run.config.get(key)) for key in keys)]
        for part in [part for part in ("eval", "train") if f"{part}/loss" in run.metrics] or [""]:
            metrics = [_number(run.metrics.get(f"{part}/{name}")) for name in (*SHOWN, "pairs_per_second")]
            table.add_row(*about, part, *metrics)
            about = [""] * len(about)
    return table


def _progress(run: RunFacts) -> str:
    if run.is_done:
        return f"{run.step}, done"
    return f"{run.step} of {run.last_step}" if run.last_step is not None else f"{run.step}, not done"


def _text(value: Value | None) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _number(metric: float | None) -> str:
    return "" if metric is None else f"{metric:.4g}"


def as_json(runs: Sequence[RunFacts], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The same for programs: every metric, and of the config the keys that differ."""
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
    """Writes each run's entry again, with the keys that differ as its columns, and says so."""
    boards = [run for run in runs if (run.folder / TENSORBOARD).is_dir()]
    written = 0
    for run, values in zip(boards, comparable([run.config for run in boards], keys), strict=True):
        sub_run = "eval" if "eval/loss" in run.metrics else "train"
        try:
            write_entry(run.folder / TENSORBOARD, sub_run, values, keys or KEYS)
            written += 1
        except OSError as failure:  # a colleague's run, for one: the table is right without
            warn(f"no entry for TensorBoard's HParams tab in {run.folder}: {failure.strerror}")
    if written:
        count = f"{written} run{'s' * (written > 1)}"
        say(f"HParams entries of {count} written; to see them, start: tensorboard --logdir {_shown(parent_of(runs))}")


def _shown(folder: Path) -> Path:
    """A folder as a person types it from here."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def comparable(configs: Sequence[Mapping[str, Value]], keys: Sequence[str]) -> Iterator[dict[str, Value]]:
    """The configs, with text wherever the values of a key are of several types: a column of the tab has one."""
    mixed = [key for key in keys if len({_kind(config.get(key)) for config in configs}) > 1]
    for config in configs:
        yield {**config, **{key: _text(config.get(key)) for key in mixed}}


def _kind(value: Value | None) -> type:
    return float if type(value) is int else type(value)


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    """`python -m launch.compare`."""
    parser = Parser("python -m launch.compare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder; runs/sweep/* names many")
    parser.add_argument("--sort", metavar="NAME", help="a metric, eval/rewards/margins, or a config key, loss.beta")
    parser.add_argument("--json", action="store_true", help="print JSON with all metrics in place of the table")
    arguments = parse_arguments(parser)
    runs = read_runs(arguments.runs)
    keys = differing(runs)
    by = arguments.sort or best_metric(runs, keys)
    runs = ordered(runs, by) if by else runs
    if arguments.json:
        print(json.dumps(as_json(runs, keys), indent=1))
    else:
        # As wide as it is: a narrow terminal wraps lines, where a narrower table would cut metrics.
        Console(highlight=False, width=10_000).print(table_of(runs, keys))
        print(f"sorted by {by or 'nothing'}; train: mean of the last {LAST_STEPS} steps")
    write_entries(runs, keys)


if __name__ == "__main__":
    sys.exit(run_program(main))
