"""Writes the metrics of a run to metrics.jsonl, and hands everything that is shown of a run to its sinks."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np

from dpo.base.files import naming
from dpo.base.full_disk import full_code
from dpo.board.sink import Answer, Ending, Sink, ending_of
from dpo.config import Config
from dpo.terminal.stalls import telling_stalls


class MetricsWriter:
    """Appends to a run's metrics.jsonl, on rank 0 alone, and calls each of the run's sinks (`dpo.board.sink`).

    As a context manager it is closed at the end of the block, and tells the sinks how that ends. Every method raises
    OSError, with the name of the run folder or of the file, where the disk is full.

    Args:
        run_dir: the run folder.
        sinks: of the run.
        check: called before anything is written; raises FolderLost where the folder is another start's now.
    """

    def __init__(self, run_dir: Path, sinks: Sequence[Sink], check: Callable[[], None] = lambda: None):
        self.run_dir, self.path, self.check = run_dir, run_dir / "metrics.jsonl", check
        self.file = self.path.open("a", encoding="utf-8")
        self.sinks = sinks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        try:
            self.close(ending_of(failure))
        except OSError:
            if failure is None or full_code(failure) is None:
                raise  # else the first write to a full disk says what was needed: a file keeps its line until it closes

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Writes a line of metrics.jsonl, `{"step": step, name: metric, ...}`, and a point in the chart of each metric.
        None, for a metric of a skipped step that is not finite, is null there and no point.

        Raises ValueError where a metric is not finite: JSON cannot hold it.
        """
        line = json.dumps({"step": step, **metrics}, allow_nan=False) + "\n"
        known = {name: metric for name, metric in metrics.items() if metric is not None}
        with telling_stalls(self.path):
            with naming(self.path, len(line)):
                self.check()
                self.file.write(line)
                self.file.flush()
            self._show(lambda sink: sink.metrics(step, known), len(line))

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Shows the distribution of the values whose mean is the metric `name`, after `step` steps."""
        self._each(lambda sink: sink.histogram(name, values, step))

    def text(self, name: str, text: str) -> None:
        """Shows a text of many lines about this start, such as `config`, unchanged."""
        self._each(lambda sink: sink.text(name, text), len(text))

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Shows the answers of policy and reference side by side, after `step` steps."""
        self._each(lambda sink: sink.answers(step, answers))

    def hparams(self, config: Config) -> None:
        """Records the config in every sink, by which runs are compared."""
        self._each(lambda sink: sink.hparams(config))

    def sync(self) -> None:
        """Waits until all lines of metrics.jsonl are on the disk (fsync): before a checkpoint gets its name."""
        with telling_stalls(self.path), naming(self.path):
            self.check()
            os.fsync(self.file.fileno())

    def close(self, ending: Ending = "done") -> None:
        """Closes metrics.jsonl and all sinks, the others too where one of them fails."""
        with telling_stalls(self.run_dir), naming(self.run_dir), ExitStack() as stack:
            for sink in reversed(self.sinks):
                stack.callback(sink.close, ending)
            stack.callback(self._close_file)

    def _close_file(self) -> None:
        """Closes metrics.jsonl; of a full disk it fails once more, for a line that is still to be written."""
        with naming(self.path):
            self.file.close()

    def _each(self, show: Callable[[Sink], None], num_bytes: int | None = None) -> None:
        """Calls each sink where the folder is still this start's."""
        with telling_stalls(self.run_dir):
            with naming(self.run_dir):
                self.check()
            self._show(show, num_bytes)

    def _show(self, show: Callable[[Sink], None], num_bytes: int | None) -> None:
        """Calls each sink, whose files take about `num_bytes` more; None: not known."""
        with naming(self.run_dir, num_bytes):
            for sink in self.sinks:
                show(sink)
