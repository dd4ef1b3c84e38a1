"""What lies in a run folder, by name, and how its metrics are read; without torch, so that a laptop can.

config.yaml       the resolved config of the last start
provenance.json   code, hosts and layout of every start, a list
metrics.jsonl     every step and evaluation
tensorboard/      the same as charts, and more
answers/          to a few evaluation prompts, by reference and policy
profile/          traces of profiled steps
checkpoints/step-000100/
final/            the trained model
jobs/             what `python -m launch.submit` and its jobs wrote: scripts, logs, reports of failures
"""

import json
from pathlib import Path

from dpo.base.errors import RunError
from dpo.base.files import write_atomically

CONFIG, PROVENANCE, METRICS, TENSORBOARD = "config.yaml", "provenance.json", "metrics.jsonl", "tensorboard"
ANSWERS, PROFILE, JOBS, FINAL = "answers", "profile", "jobs", "final"

LAST_STEPS = 10
"""A metric of training is shown as its mean over so many last steps: one step's pairs say little."""


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off by a crash is left out.

    Raises RunError for a line that is none.
    """
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is no whole line
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line]


def _parsed(line: bytes, place: str) -> dict[str, float]:
    try:
        metrics: dict[str, float] = json.loads(line)
        if isinstance(metrics["step"], int):
            return metrics
    except (ValueError, KeyError, TypeError):
        pass
    raise RunError(f"{place}: no line of metrics: {line[:60]!r}; valid: mend it, or move the file away")


def drop_metrics_after(run_dir: Path, step: int) -> None:
    """Rewrites metrics.jsonl without the lines of steps after `step`, in one atomic replacement."""
    kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
    write_atomically(run_dir / METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())
