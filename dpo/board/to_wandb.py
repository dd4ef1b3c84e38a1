"""A run in W&B: https://docs.wandb.ai. WANDB_PROJECT, WANDB_MODE and the like are read as by its library."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb

from dpo.board.sink import Ending
from dpo.board.tracker import Opening
from dpo.board.wandb_file import files_of, rows_of
from dpo.terminal.console import is_quiet

SECONDS_IN_MEMORY = 1.0
"""Seconds for which W&B may hold rows in memory, before it writes them to its file."""

LOGIN_SECONDS = 60.0
"""Seconds for which W&B may wait at a terminal for a login: all ranks wait with it."""

FINISH_SECONDS = 60.0
"""Seconds for which W&B may send at the end of a start, where the network is down or slow; without it, it waits
forever. What is not sent lies in RUN/trackers, from where `wandb sync` sends it."""


class WandbRun:
    """A `Client` of W&B.

    W&B numbers rows by its own step, which must never fall: a resumed run may begin with an evaluation after a step
    that it has sent. So the rows are counted, and all charts are drawn over `step`, a value of each row.
    """

    def __init__(self, opening: Opening):
        settings = wandb.Settings(
            console="off",
            quiet=is_quiet(),
            login_timeout=LOGIN_SECONDS,
            finish_timeout=FINISH_SECONDS,
            x_transaction_log_flush_interval=SECONDS_IN_MEMORY,
        )
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dpo"),
            name=os.environ.get("WANDB_NAME", opening.name),
            id=opening.id,
            resume="allow",
            dir=str(opening.folder),
            settings=settings,
        )
        self.opening = opening
        self.run.config.update(dict(opening.config), allow_val_change=True)
        self.run.define_metric("*", step_metric="step")
        self.num_rows = max(opening.num_rows, self.run.step)

    def held(self) -> Mapping[str, int] | None:
        """Returns name -> last step of all in W&B's files of earlier starts: rows of the last second before a crash are
        not in them. None where there is no such file, as after `wandb sync --clean`.
        """
        here = Path(self.run.dir).parent
        earlier = [path for path in files_of(self.opening.folder, self.opening.id) if path.parent.name != here.name]
        last: dict[str, int] = {}
        for row in (row for path in earlier for row in rows_of(path) if "step" in row):
            last |= {name: max(row["step"], last.get(name, 0)) for name in row}
        return last if earlier else None

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends a row at once."""
        self.run.log({"step": step, **row}, step=self.num_rows, commit=True)
        self.num_rows += 1

    def histogram(self, counts: np.ndarray, edges: np.ndarray) -> Any:
        """Returns a histogram."""
        return wandb.Histogram(np_histogram=(counts, edges))

    def text(self, text: str) -> Any:
        """Returns a text as a page of HTML, which shows it unchanged."""
        return wandb.Html(f"<pre>{html.escape(text)}</pre>", data_is_not_path=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
        """Returns a table."""
        return wandb.Table(columns=list(columns), data=[list(row) for row in rows])

    def close(self, ending: Ending) -> None:
        """Waits until all is sent, or on the disk where W&B is offline, at most FINISH_SECONDS.

        W&B shows a run that fails as failed, and one that is preempted as preempted, until its next start.
        """
        if ending == "preempted":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if ending == "done" else 1)
