"""The names of the files of a run folder, and the readers of its metrics and answers; without torch.

config.yaml       the resolved config of the last start
provenance.json   code, hosts and layout of each start, a list
log.txt           everything that rank 0 says, of all starts, with time stamps; of a long log, log.1.txt came before
metrics.jsonl     the metrics of each step and evaluation, one line each
tensorboard/      the same as charts, with histograms and texts
trackers/         what trackers such as W&B were sent, with the files of their libraries
answers/          answers of reference and policy to a few evaluation prompts
eval/             the values of single pairs at each evaluation, see `dpo.run_folder.evaluations`
report.html       the run as one page, see `dpo.report`
nonfinite/        the pairs of steps and evaluations that were not finite
profile/          traces of profiled steps
checkpoints/step-000100/
final/            the trained model
lock/             the start that writes to the folder, see `dpo.run_folder.lock`
jobs/             scripts, logs and reports of failures, written by `python -m launch.submit` and its jobs
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from dpo.base.errors import RunError
from dpo.base.files import write_atomically
from dpo.terminal.console import say

CONFIG, PROVENANCE, METRICS, TENSORBOARD = "config.yaml", "provenance.json", "metrics.jsonl", "tensorboard"
ANSWERS, PROFILE, JOBS, FINAL = "answers", "profile", "jobs", "final"
EVALUATIONS, REPORT, LOG, TRACKERS, LOCK = "eval", "report.html", "log.txt", "trackers", "lock"
NONFINITE, SKIPPED = "nonfinite", "train/skipped"
"""The folder of pairs that are not finite, and the metric, 1, of a step that was skipped for them."""

LAST_STEPS = 10
"""Steps over which a training metric is averaged where it is shown as a single number: single steps vary much."""
SPANS = 4
"""Spans of steps that a message names."""


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics.jsonl, without a last line that a crash has cut off. A metric that was not
    finite, which is null there, is left out.

    Raises RunError for a line that does not hold metrics.
    """
    lines = read_lines(run_dir)
    return [{name: value for name, value in line.items() if value is not None} for line in lines]


def is_step(line: Mapping[str, float]) -> bool:
    """Returns whether a line is that of a training step; a step that was skipped may have no loss."""
    return "train/loss" in line or SKIPPED in line


def read_lines(run_dir: Path) -> list[dict[str, float | None]]:
    """Returns the lines as they stand, otherwise as `read_metrics` does."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # the bytes after the last newline are not a complete line
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line]


def _parsed(line: bytes, place: str) -> dict[str, float | None]:
    try:
        metrics: dict[str, float | None] = json.loads(line)
        if isinstance(metrics["step"], int):
            return metrics
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise RunError(f"{place}: not a line of metrics: {line[:60]!r}; correct it, or move the file away")


def answers_path(run_dir: Path, step: int) -> Path:
    """Returns the file of the answers after `step` steps."""
    return run_dir / ANSWERS / f"step-{step:06d}.jsonl"


def read_answer_rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a file of answers: `prompt`, `reference` and `policy` of each.

    Raises OSError, or ValueError or KeyError where the file is damaged.
    """
    lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other line ends, such as U+2028
    rows = [json.loads(line) for line in lines if line.strip()]
    return [{name: str(row[name]) for name in ("prompt", "reference", "policy")} for row in rows]


def drop_metrics_after(run_dir: Path, step: int) -> None:
    """Replaces metrics.jsonl, atomically, by its lines up to `step`, each step once and in order, before a run goes on
    from there.

    Of two lines of a step and kind (`train`, `eval`) the last stays: it was written by the later start, and the
    checkpoint is of that. Tells what stood twice, and which training steps are missing; it does not make them up. The
    steps before the run's first, which another run has made, are not missing.
    """
    path, lines = run_dir / METRICS, [line for line in read_lines(run_dir) if _place(line)[0] <= step]
    kept = {_place(line): line for line in lines}
    doubled = Counter(map(_place, lines))
    if len(kept) < len(lines):
        steps = {number for (number, _), count in doubled.items() if count > 1}
        say(f"{path}: {spans(steps)} stood there more than once; the last line of each is kept")
    present = {number for number, kind in kept if kind == "train"}
    missing = set(range(_first_step(run_dir, present), step + 1)) - present
    if missing:
        say(f"{path}: {spans(missing)} {'is' if len(missing) == 1 else 'are'} missing; the run goes on without")
    ordered = [kept[place] for place in sorted(kept, key=lambda place: place[0])]  # of a step as they stood
    if ordered != [*kept.values()]:
        say(f"{path}: its lines were not in the order of the steps, and are put in order")
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in ordered).encode())


def _first_step(run_dir: Path, present: Collection[int]) -> int:
    """Returns the first step of the metrics of a run: that of its last start from nothing or from another run's
    checkpoint; where no such start is recorded, the first step that is present.
    """
    try:
        starts = json.loads((run_dir / PROVENANCE).read_bytes())
        begun = [int(start["first_step"]) for start in starts if start.get("goes_on") is False]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        begun = []  # of an older version, or damaged; a run does not need the file
    return begun[-1] if begun else min(present, default=1)


def _place(line: Mapping[str, float | None]) -> tuple[int, str]:
    """Returns the step of a line of metrics, and the part of a run that it is about, the first word of its names:
    `train`, `eval`.
    """
    return int(line["step"] or 0), next((name.partition("/")[0] for name in line if name != "step"), "")


def spans(steps: Collection[int]) -> str:
    """Returns steps as words, the first SPANS of their spans: `step 4`, `steps 4 to 6, 9, 12 to 13, …`."""
    bounds: list[list[int]] = []
    for step in sorted(steps):
        if bounds and step == bounds[-1][1] + 1:
            bounds[-1][1] = step
        else:
            bounds.append([step, step])
    words = [f"{first} to {last}" if last > first else str(first) for first, last in bounds[:SPANS]]
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(words)}{', …' if len(bounds) > SPANS else ''}"
