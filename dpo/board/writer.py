"""Writes the metrics of a run to metrics.jsonl and TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from dpo.board.dashboard import Dashboard


class MetricsWriter:
    """Appends to a run's metrics.jsonl and TensorBoard events, on rank 0 alone, from step `first_step` on."""

    def __init__(self, run_dir: Path, first_step: int):
        self.file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.board = Dashboard(run_dir / "tensorboard", first_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a line of metrics.jsonl, `{"step": step, name: metric, ...}`, and a point in the chart of each metric.

        Raises ValueError where a metric is not finite: JSON cannot hold it.
        """
        print(json.dumps({"step": step, **metrics}, allow_nan=False), file=self.file, flush=True)
        self.board.metrics(step, metrics)

    def sync(self) -> None:
        """Waits until all lines of metrics.jsonl are on the disk (fsync)."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes all files."""
        self.file.close()
        self.board.close()
