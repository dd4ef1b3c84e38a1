"""A run in TensorBoard: charts, histograms, texts, answers and the HParams entry; for rank 0 alone, without torch.

`charts.py` has the chart of each metric. Each sub-run has its own event files, which are created with its first point.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, create_summary_metadata
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.util.tensor_util import make_tensor_proto

from dpo.base.console import harmless
from dpo.board.charts import LAYOUT, ROOT, Chart, histogram_place, place, text_place
from dpo.board.event_files import drop_points, event_files, open_events, write_event
from dpo.board.hparams import flat, write_entry
from dpo.board.sink import Answer
from dpo.config import Config

COLUMN_WIDTH = 44
"""Characters per column; three columns fit into a window of 1,500 pixels."""


class Dashboard:
    """Writes RUN/tensorboard from step `first_step` on, on rank 0 alone. Each point is flushed at once.

    The constructor removes the points of an interrupted run at steps >= `first_step`. A TensorBoard that has already
    read them discards them at the latest when it reads the first new point of the same chart.
    """

    def __init__(self, folder: Path, first_step: int):
        self.folder, self.first_step = folder, first_step
        self.files: dict[str, BinaryIO] = {}
        old = event_files(folder)
        for path in old:
            drop_points(path, first_step)
        for sub_run in {path.parent.relative_to(folder).as_posix() for path in old}:
            self._file(sub_run)  # at once, so that an open TensorBoard discards the removed points
        self._write(ROOT, layout_summary(LAYOUT), first_step)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a point to the chart of each metric; names as in metrics.jsonl."""
        values: dict[str, list[Summary.Value]] = {}
        for name, metric in metrics.items():
            sub_run, tag = place(name)
            values.setdefault(sub_run, []).append(Summary.Value(tag=tag, simple_value=metric))
        for sub_run, points in values.items():
            self._write(sub_run, Summary(value=points), step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Adds the histogram of the values whose mean is a metric.

        Args:
            name: the name of the metric, as in metrics.jsonl.
            values: an array of numbers, any shape.
            step: the step of the point.
        """
        sub_run, tag = histogram_place(name)
        self._write(sub_run, histogram_pb(tag, values), step)

    def text(self, name: str, text: str) -> None:
        """Writes a page of the Text tab about this start, which shows a text of many lines unchanged."""
        self._page(name, fenced(text), self.first_step)

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Writes the table of answers, policy and reference side by side, after `step` steps."""
        self._page("answers", answers_table(answers), step)

    def hparams(self, config: Config) -> None:
        """Writes the run's entry in the HParams tab, replacing an earlier entry; the tab shows the newest metrics."""
        evaluates = config.data.eval or any(source.holdout for source in config.data.train)
        write_entry(self.folder, "eval" if evaluates else "train", flat(asdict(config)))

    def close(self) -> None:
        """Closes all files."""
        for file in self.files.values():
            file.close()

    def _page(self, name: str, markdown: str, step: int) -> None:
        sub_run, tag = text_place(name)
        self._write(sub_run, text_pb(tag, markdown), step)

    def _write(self, sub_run: str, summary: Summary, step: int) -> None:
        file = self._file(sub_run)
        write_event(file, Event(step=step, summary=summary))
        file.flush()

    def _file(self, sub_run: str) -> BinaryIO:
        if sub_run not in self.files:
            self.files[sub_run] = open_events(self.folder / sub_run, self.first_step)
        return self.files[sub_run]


def layout_summary(layout: Mapping[str, Sequence[Chart]]) -> Summary:
    """Returns the layout of the Custom Scalars tab: categories of charts, each with all lines of its tag."""
    categories = [
        layout_pb2.Category(
            title=title,
            chart=[
                layout_pb2.Chart(
                    title=chart.title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{re.escape(chart.tag)}$"])
                )
                for chart in charts
            ],
        )
        for title, charts in layout.items()
    ]
    content = layout_pb2.Layout(category=categories).SerializeToString()
    tensor = make_tensor_proto(content, dtype=np.object_)
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, metadata=create_summary_metadata(), tensor=tensor)])


def answers_table(answers: Sequence[Answer]) -> str:
    """Returns a Markdown table of prompt, reference and policy that shows every character of the texts as it is."""
    rows = [(answer.prompt, answer.reference, answer.policy) for answer in answers]
    lines = ["| prompt | reference | policy |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {' | '.join(map(verbatim, row))} |" for row in rows])


def verbatim(text: str) -> str:
    """Returns one line of Markdown that shows the exact characters of a text, COLUMN_WIDTH of them per line at most.

    Invisible characters are shown by a picture or a number. All characters but letters, digits and single spaces are
    written as HTML entities, so that no Markdown, table, tag or link remains.
    """
    lines = [part for line in harmless(text).expandtabs(4).split("\n") for part in _wrapped(line)]
    return "<br>".join(re.sub(r"[^\w ]|_|(?<= ) |^ ", lambda match: f"&#{_code(match[0])};", line) for line in lines)


def _wrapped(line: str) -> list[str]:
    """Wraps a line to COLUMN_WIDTH: a browser makes a column as wide as its longest line, and squeezes the others."""
    return textwrap.wrap(line, COLUMN_WIDTH, drop_whitespace=False, replace_whitespace=False) or [""]


def _code(character: str) -> int:
    """Returns a character's code point; for a space a no-break space's, since HTML shows successive spaces as one."""
    return ord("\N{NO-BREAK SPACE}" if character == " " else character)


def fenced(text: str) -> str:
    """Returns Markdown that shows a text of many lines, such as YAML, unchanged in a block of code."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"
