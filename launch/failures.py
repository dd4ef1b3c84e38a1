"""Collects the failures of the ranks of a node, and describes the failure to blame (`dpo.command.blame`)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from dpo.base.workers import signal_name
from dpo.command.blame import PLACE_FILE, Failure, first_cause, place_of_killed, read_error

_TRACEBACK = re.compile(
    r"^Traceback \(most recent call last\):\n(?: .*\n|\n)*(?P<last>\w[\w.]*: .*|\w+)$", re.MULTILINE
)
"""A Python traceback on stderr; the group `last` is its last line."""

_TABLE_ROW = re.compile(
    r"^ +time +: (?P<time>\S+)\n +host .*\n +rank +: (?P<rank>\d+) \(local_rank: (?P<local>\d+)\)\n"
    r" +exitcode +: (?P<code>-?\d+)",
    re.MULTILINE,
)
"""The entry of a rank in the table that torchrun prints when it fails."""


def failures_of_node(log_dir: Path, torchrun_error: Path, stderr: str, host: str, first_rank: int) -> list[Failure]:
    """Collects the failures of the ranks of a node: from their error files, and for ranks without one from the table on
    torchrun's stderr; if there are none, from torchrun's own error file.

    Args:
        log_dir: torchrun's log folder, with the error files of the ranks.
        torchrun_error: torchrun's own error file.
        stderr: the last lines of torchrun and its ranks.
        host: name of the node.
        first_rank: the rank with local rank 0.
    """
    raised = {first_rank + local: path for local, path in _error_files(log_dir)}
    failures = [read_error(path, host, rank) for rank, path in raised.items()]
    message = None if raised else _last_traceback_line(stderr)
    killed = [failure for failure in _table(stderr, host, message) if failure.rank not in raised]
    failures += [_with_place(failure, log_dir, first_rank) for failure in killed]
    if not failures and torchrun_error.exists():
        failures.append(read_error(torchrun_error, host, None))
    return failures


def _with_place(failure: Failure, log_dir: Path, first_rank: int) -> Failure:
    """Returns the failure of a rank without an error file, with the place where it was."""
    assert failure.rank is not None, "torchrun's table has ranks alone"
    local = failure.rank - first_rank
    places = [place_of_killed(path) for path in sorted(log_dir.glob(f"*/attempt_*/{local}/{PLACE_FILE}"))]
    return replace(failure, place=places[-1]) if places else failure


def _error_files(log_dir: Path) -> Iterator[tuple[int, Path]]:
    """Yields (local rank, error file) of each rank that raised."""
    for path in sorted(log_dir.glob("*/attempt_*/*/error.json")):
        yield int(path.parent.name), path


def _table(stderr: str, host: str, message: str | None) -> Iterator[Failure]:
    """Yields the failures in torchrun's table. A rank that was not killed gets `message`, or else its exit code."""
    for row in _TABLE_ROW.finditer(stderr):
        code = int(row["code"])
        time = datetime.fromisoformat(row["time"]).timestamp() + 0.999  # printed in whole seconds, rounded down
        if code < 0:
            how = f"killed by {signal_name(-code)}, without a Python exception"
            yield Failure(host, int(row["rank"]), time, how, killed_by=-code)
        else:
            yield Failure(host, int(row["rank"]), time, message or f"exit code {code}")


def _last_traceback_line(stderr: str) -> str | None:
    """Returns the last line of the first traceback on stderr: why a rank ended before it could write an error file, for
    example because a library is missing.

    All ranks of a node share one stderr, so the traceback may be another rank's; usually all ranks then have the same.
    """
    traceback = _TRACEBACK.search(stderr)
    return traceback["last"] if traceback else None


def describe(failures: Sequence[Failure]) -> str:
    """Returns, in one line, why a job failed."""
    cause = first_cause(failures)
    return str(cause) if cause else "torchrun failed, and none of its ranks reported why"
