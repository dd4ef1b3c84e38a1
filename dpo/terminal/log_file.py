"""The log of a run, `RUN/log.txt`: everything that rank 0 says, with a time stamp before each line.

A log of MAX_BYTES is renamed to log.1.txt, in place of an earlier one, and the next line begins a new one.

    before the folder is known             lines are kept in memory
    `write_to(RUN/log.txt)`                writes the kept lines
    from then on                           appends each line at once
    `begin`, where the next run begins     closes the file; the next run's lines are kept

A run does not end because of its log: a line that cannot be written is lost, and the first such line gives a warning.
"""

import logging
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from dpo.base.files import naming
from dpo.base.space import describe_full
from dpo.terminal.stalls import telling_stalls

MAX_BYTES = 10_000_000
MAX_KEPT = 10_000
"""The maximum number of lines that are kept: a program without a run folder may say many."""


class LogFile(logging.Handler):
    """Appends each record to a file as one line; keeps the records for the next file while there is none."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self.kept: deque[str] = deque(maxlen=MAX_KEPT)
        self.file: TextIO | None = None
        self.has_warned = False
        self.num_runs = 0

    def begin(self) -> None:
        """Begins a run. The records before the first run of a process belong to it; of a further run they are those of
        an earlier run, whose file is closed.
        """
        if self.num_runs:
            self.kept.clear()
        if self.file:
            with suppress(OSError):  # a line that a full disk did not take
                self.file.close()
        self.file, self.has_warned = None, False
        self.num_runs += 1

    def write_to(self, path: Path) -> None:
        """Appends the kept records, and from now on every record, to the file `path`; makes its folder."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8")
        except OSError as failure:
            self._warn(path, failure)
            return
        while self.kept:
            self._append(self.kept.popleft())

    def emit(self, record: logging.LogRecord) -> None:
        """Appends a record; its own time is its stamp."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{stamp}  {self.format(record)}\n"
        if self.file is None:
            self.kept.append(line)
        else:
            self._append(line)

    def _append(self, line: str) -> None:
        assert self.file is not None, "only records of a run with a file are appended"
        path = Path(self.file.name)
        try:
            with telling_stalls(path), naming(path, len(line.encode(errors="replace"))):
                self.file.write(line)
                self.file.flush()
                if self.file.tell() >= self.max_bytes:
                    self._begin_anew(self.file, path)
        except OSError as failure:
            self._warn(path, failure)

    def _begin_anew(self, full: TextIO, path: Path) -> None:
        """Renames a log that is full, and begins the next one with a line that says so."""
        earlier = path.with_stem(f"{path.stem}.1")
        full.close()
        path.replace(earlier)
        self.file = path.open("a", encoding="utf-8")
        line = f"the log before is in {earlier.name}: it had {self.max_bytes / 1e6:g} MB"
        self.handle(logging.makeLogRecord({"msg": line, "levelname": "INFO"}))

    def _warn(self, path: Path, failure: OSError) -> None:
        if not self.has_warned:
            self.has_warned = True  # first: the warning is a record too
            reason = describe_full(failure, path) or f"{path}: {failure.strerror}"
            logging.getLogger("dpo").warning(f"WARNING: the log lacks lines from here on: {reason}")
