"""The sink of an experiment tracker, such as W&B: each row is sent once, over all starts of a run.

A resumed run computes steps again that it has sent before: some trackers ignore a row of an earlier step, others keep
both. So `Journal` records the rows that were sent, and such a row is not sent again. A row that was not sent, because
the tracker failed or was added to `train.report_to` later, is sent by the next start, from metrics.jsonl.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dpo.base.files import naming
from dpo.board.bins import bins
from dpo.board.charts import histogram_tag, text_tag
from dpo.board.journal import Journal
from dpo.board.sink import Answer, Ending
from dpo.board.values import Value, flat
from dpo.command.exits import line_of
from dpo.config import Config
from dpo.terminal.console import warn

COLUMNS = ("prompt", "reference", "policy")


@dataclass(frozen=True)
class Opening:
    """What a client opens: a run in a tracker."""

    name: str
    """The name of the run folder."""
    id: str
    """The same at each start of the run."""
    folder: Path
    """Folder for files of the tracker's library."""
    config: Mapping[str, Value]
    """SECTION.KEY -> value."""
    num_rows: int
    """Rows that earlier starts have sent."""


class Client(Protocol):
    """A run in a tracker, by the tracker's library. Every method may raise any error of that library."""

    def held(self) -> Mapping[str, int] | None:
        """Returns name -> last step of all that the tracker holds of the run; None where it does not tell."""

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends metrics, or values that the next three methods return, by name."""

    def histogram(self, counts: np.ndarray, edges: np.ndarray) -> Any:
        """Returns a histogram for `send`."""

    def text(self, text: str) -> Any:
        """Returns a text of many lines for `send`."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
        """Returns a table of texts for `send`."""

    def close(self, ending: Ending) -> None:
        """Waits until all is sent, for a limited time, and tells the tracker how this start ends."""


class Tracker:
    """Sends a run to a tracker, on rank 0 alone.

    Where the library raises an error, warns and sends no more: the run goes on.

    Args:
        name: the tracker's name in `train.report_to`.
        config: the run's.
        first_step: the first step of this start.
        connect: opens the run in the tracker.
    """

    def __init__(self, name: str, config: Config, first_step: int, connect: Callable[[Opening], Client]):
        self.name, self.first_step = name, first_step
        self.folder = Path(str(config.train.run_dir)) / "trackers"
        self.client: Client | None = None
        self.journal: Journal | None = None
        self._attempt(lambda: self._open(config, connect))

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends metrics by their names in metrics.jsonl."""
        self._send(step, next(iter(metrics)), lambda client: metrics)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Sends the distribution of the values whose mean is the metric `name`."""
        tag = histogram_tag(name)
        self._send(step, tag, lambda client: {tag: client.histogram(*bins(values))})

    def text(self, name: str, text: str) -> None:
        """Sends a text about this start."""
        tag = text_tag(name)
        self._send(self.first_step, tag, lambda client: {tag: client.text(text)})

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Sends the table of answers."""
        self._send(step, "answers", lambda client: {"answers": client.table(COLUMNS, [*map(astuple, answers)])})

    def hparams(self, config: Config) -> None:
        """Does nothing: the config was sent as the tracker was opened."""

    def close(self, ending: Ending = "done") -> None:
        """Waits until all is sent, and tells the tracker how this start ends."""
        client, journal = self.client, self.journal
        try:
            if client:
                self._attempt(lambda: client.close(ending))
        finally:
            if journal:
                self._attempt(journal.close)

    def _open(self, config: Config, connect: Callable[[Opening], Client]) -> None:
        self.journal = journal = Journal(self.folder / f"{self.name}.jsonl")
        values = flat(asdict(config))
        client = connect(Opening(self.folder.parent.name, journal.id, self.folder, values, journal.num_rows))
        held = client.held()
        journal.last = journal.last if held is None else held
        self.client = client

    def _send(self, step: int, name: str, row: Callable[[Client], Mapping[str, Any]]) -> None:
        """Sends a row, which goes by its first name, unless an earlier start has sent it."""
        client, journal = self.client, self.journal

        def send(client: Client, journal: Journal) -> None:
            client.send(step, row(client))
            journal.add(step, name)

        if client and journal and not journal.has(step, name):
            self._attempt(lambda: send(client, journal))

    def _attempt(self, action: Callable[[], None]) -> None:
        """Calls the library. After an error of any kind, warns and sends no more."""
        try:
            with naming(self.folder):
                action()
        except Exception as failure:  # such as the network's: a run must not end with its tracker
            self.client = None
            reason = line_of(failure)
            later = "the run does not end with it, and its next start sends the metrics that are missing"
            warn(f"{self.name} failed, and is sent no more: {reason:.300}; {later}")
