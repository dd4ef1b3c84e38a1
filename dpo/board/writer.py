"""Writes the metrics of a run to metrics.jsonl, and hands everything that is shown of a run to its sinks."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dpo.base.files import naming
from dpo.board.sink import Answer, Sink
from dpo.config import Config


class MetricsWriter:
    """Appends to a run's metrics.jsonl, on rank 0 alone, and calls each of the run's sinks (`dpo.board.sink`)."""

    def __init__(self, run_dir: Path, sinks: Sequence[Sink]):
        self.run_dir = run_dir
        self.file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.sinks = sinks

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a line of metrics.jsonl, `{"step": step, name: metric, ...}`, and a point in the chart of each metric.

        Raises ValueError where a metric is not finite: JSON cannot hold it. Raises OSError, with the name of the
        folder, where the disk is full.
        """
        with naming(self.run_dir):
            print(json.dumps({"step": step, **metrics}, allow_nan=False), file=self.file, flush=True)
            for sink in self.sinks:
                sink.metrics(step, metrics)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Shows the distribution of the values whose mean is the metric `name`, after `step` steps."""
        for sink in self.sinks:
            sink.histogram(name, values, step)

    def text(self, name: str, text: str) -> None:
        """Shows a text of many lines about this start, such as `config`, unchanged."""
        for sink in self.sinks:
            sink.text(name, text)

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Shows the answers of policy and reference side by side, after `step` steps."""
        for sink in self.sinks:
            sink.answers(step, answers)

    def hparams(self, config: Config) -> None:
        """Records the config in every sink, by which runs are compared."""
        for sink in self.sinks:
            sink.hparams(config)

    def sync(self) -> None:
        """Waits until all lines of metrics.jsonl are on the disk (fsync)."""
        with naming(self.run_dir):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes metrics.jsonl and all sinks."""
        with naming(self.run_dir):  # of a full disk it fails once more, for a line that is still to be written
            self.file.close()
        for sink in self.sinks:
            sink.close()
