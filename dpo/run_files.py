"""What lies in a run folder, by name, and how its metrics are read; without torch, so that a laptop can.

config.yaml  provenance.json  metrics.jsonl  tensorboard/  answers/  profile/  checkpoints/step-000100/  final/
jobs/        what `python -m launch.submit` and its jobs wrote: scripts, logs, reports of failures
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG, PROVENANCE, METRICS, TENSORBOARD = "config.yaml", "provenance.json", "metrics.jsonl", "tensorboard"
ANSWERS, PROFILE, JOBS, FINAL = "answers", "profile", "jobs", "final"

STATUS_FILE = "DPO_STATUS_FILE"
"""The environment variable in which a launcher names the file that `write_status` fills."""


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off by a crash is left out."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # what follows the last newline is no whole line


def drop_metrics_after(run_dir: Path, step: int) -> None:
    """Rewrites metrics.jsonl without the lines of steps after `step`, in one atomic replacement."""
    kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
    fresh = run_dir / f"{METRICS}.tmp"
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    fresh.replace(run_dir / METRICS)


def write_status(status: Mapping[str, Any]) -> None:
    """Tells the launcher, if there is one, how a program ended well: {"state": "done" or "preempted", "step": s}.

    For rank 0 alone. torchrun's exit code does not say it: 0 is both.
    """
    path = os.environ.get(STATUS_FILE)
    if path:
        draft = Path(f"{path}.tmp")
        draft.write_text(json.dumps(status), encoding="utf-8")
        draft.replace(path)
