"""A run in trackio: https://github.com/gradio-app/trackio. TRACKIO_SPACE_ID, TRACKIO_DIR and the like are read as by
its library. Without a space the run lies in a database on this machine.
"""

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import trackio
from trackio.sqlite_storage import SQLiteStorage
from trackio.utils import get_storage_mode

from dpo.board.dashboard import fenced
from dpo.board.sink import Ending
from dpo.board.tracker import Opening
from dpo.terminal.console import say


class TrackioRun:
    """A `Client` of trackio, which knows a run by its name."""

    def __init__(self, opening: Opening):
        self.project, self.name = os.environ.get("TRACKIO_PROJECT", "dpo"), f"{opening.name}-{opening.id}"
        with redirect_stdout(io.StringIO()):  # what it prints
            self.run = trackio.init(self.project, name=self.name, resume="allow", config=dict(opening.config))
        say(f"trackio: run {self.name}; to see it: trackio show --project {self.project}")

    def held(self) -> Mapping[str, int] | None:
        """Returns name -> last step of all in the database of this machine: rows of the last half second before a crash
        are not in it. None where the run is elsewhere.
        """
        if self.run.url is not None or get_storage_mode() != "sqlite":
            return None
        rows = SQLiteStorage.get_logs(self.project, self.name, run_id=self.run.id)
        last: dict[str, int] = {}
        for row in rows:
            last |= {name: max(row["step"], last.get(name, 0)) for name in row}
        return last

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        """Hands a row to trackio's thread."""
        self.run.log(dict(row), step=step)

    def histogram(self, counts: np.ndarray, edges: np.ndarray) -> Any:
        """Returns a histogram."""
        return trackio.Histogram(np_histogram=(counts, edges))

    def text(self, text: str) -> Any:
        """Returns a text as a block of code, which shows it unchanged."""
        return trackio.Markdown(fenced(text))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
        """Returns a table."""
        return trackio.Table(columns=list(columns), data=[list(row) for row in rows])

    def close(self, ending: Ending) -> None:
        """Waits until all is sent, at most 30 seconds: trackio has that limit, and no word for an ending."""
        with redirect_stdout(io.StringIO()):
            trackio.finish()
