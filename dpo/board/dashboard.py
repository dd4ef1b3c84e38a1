"""A run in TensorBoard: charts, histograms, texts, answers and the HParams entry; for rank 0 alone, without torch.

`charts.py` has the tag of each metric. Each start writes an event file of its own.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, create_summary_metadata
from tensorboard.plugins.histogram.metadata import create_summary_metadata as histogram_metadata
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.util.tensor_util import make_tensor_proto

from dpo.base.files import naming
from dpo.board.bins import bins
from dpo.board.charts import LAYOUT, Chart, has_chart, histogram_tag, text_tag
from dpo.board.event_files import add_event, drop_points, event_files, open_events, put_aside_sub_runs
from dpo.board.hparams import write_entry
from dpo.board.sink import Answer, Ending
from dpo.board.values import flat
from dpo.config import Config
from dpo.terminal.console import harmless

COLUMN_WIDTH = 44
"""Characters per column; three columns fit into a window of 1,500 pixels."""


class Dashboard:
    """Writes RUN/tensorboard from step `first_step` on, on rank 0 alone. Each point is flushed at once.

    The constructor removes the points of an interrupted run at steps >= `first_step`. A TensorBoard that has already
    read them discards them at the latest when it reads the first new point of the same chart. Event files of an older
    version are renamed, and the points of `earlier`, lines of metrics.jsonl, are written again.
    """

    def __init__(self, folder: Path, first_step: int, earlier: Sequence[Mapping[str, float]] = ()):
        self.folder, self.first_step = folder, first_step
        rewrites = put_aside_sub_runs(folder)
        for path in event_files(folder):
            drop_points(path, first_step)
        self.file = open_events(folder, first_step)  # at once, so that an open TensorBoard discards the removed points
        self._write(layout_summary(LAYOUT), first_step)
        for line in earlier if rewrites else ():
            self.metrics(int(line["step"]), {name: metric for name, metric in line.items() if name != "step"})

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a point to the chart of each metric; tags are the names in metrics.jsonl."""
        points = [Summary.Value(tag=name, simple_value=metric) for name, metric in metrics.items() if has_chart(name)]
        if points:
            self._write(Summary(value=points), step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Adds the histogram of the values whose mean is a metric.

        Args:
            name: the name of the metric, as in metrics.jsonl.
            values: an array of numbers, any shape.
            step: the step of the point.
        """
        self._write(histogram_summary(histogram_tag(name), values), step)

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

    def close(self, ending: Ending = "done") -> None:
        """Closes the event file, however the start ends."""
        with naming(Path(self.file.name)):
            self.file.close()

    def _page(self, name: str, markdown: str, step: int) -> None:
        valid = markdown.encode(errors="replace").decode()  # a path may hold any byte
        self._write(text_pb(text_tag(name), valid), step)

    def _write(self, summary: Summary, step: int) -> None:
        add_event(self.file, Event(step=step, summary=summary))


def layout_summary(layout: Mapping[str, Sequence[Chart]]) -> Summary:
    """Returns the layout of the Custom Scalars tab: categories of charts, each with all lines of its tags."""
    categories = [
        layout_pb2.Category(
            title=title,
            chart=[
                layout_pb2.Chart(
                    title=chart.title,
                    multiline=layout_pb2.MultilineChartContent(tag=[f"^{re.escape(tag)}$" for tag in chart.tags]),
                )
                for chart in charts
            ],
        )
        for title, charts in layout.items()
    ]
    content = layout_pb2.Layout(category=categories).SerializeToString()
    tensor = make_tensor_proto(content, dtype=np.object_)
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, metadata=create_summary_metadata(), tensor=tensor)])


def histogram_summary(tag: str, values: np.ndarray) -> Summary:
    """Returns the histogram of values as TensorBoard keeps it: a row per bucket, left edge, right edge and count."""
    counts, edges = bins(values)
    tensor = make_tensor_proto(np.stack([edges[:-1], edges[1:], counts], axis=1), dtype=np.float64)
    metadata = histogram_metadata(display_name=None, description=None)
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


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
