"""Writes a run, or several side by side, as one HTML page.

    python -m dpo.report RUN [RUN ...] [--out FILE] [--metric NAME]

The page of one run is written into its folder, RUN/report.html, that of several into ./report.html.
"""

import errno
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from dpo.base.errors import UserError
from dpo.base.files import write_atomically
from dpo.report.arguments import read_arguments
from dpo.report.page import page_of_run, page_of_runs
from dpo.report.record import Record, is_run, read_record
from dpo.run_folder.files import CONFIG, JOBS, METRICS, REPORT
from dpo.terminal.console import say, warn


def write_report(run_dirs: Sequence[Path], out: Path, metric: str | None = None) -> None:
    """Writes the page of one run or of several.

    Args:
        run_dirs: the run folders, at least one.
        out: the file to write.
        metric: the metric of the heat map of several runs; None: held-out accuracy and margin.

    Raises:
        UserError: no run has the metric.
        OSError: the file cannot be written.
    """
    records = [read_record(folder) for folder in run_dirs]
    for record in records:
        for fault in record.faults:
            warn(f"{record.folder}: {fault}")
    _check_metric(records, metric)
    page = page_of_run(records[0]) if len(records) == 1 else page_of_runs(records, metric)
    write_atomically(out.absolute(), page.encode("utf-8", errors="replace"))


def report_at_end(run_dir: Path) -> None:
    """Writes RUN/report.html at the end of a run, which does not fail where the page does: warns instead."""
    try:
        write_report([run_dir], run_dir / REPORT)
        say(f"report: {run_dir / REPORT}")
    except Exception as failure:  # any: a page is not worth a run
        warn(f"{run_dir / REPORT} was not written: {type(failure).__name__}: {failure}")


def _check_metric(records: Sequence[Record], metric: str | None) -> None:
    known = sorted({name for record in records for line in (*record.evals, *record.train) for name in line} - {"step"})
    if metric is not None and metric not in known:
        raise UserError("command line: --metric", f"no run has {metric!r}", ", ".join(known))


def chosen_runs(folders: Sequence[Path]) -> list[Path]:
    """Returns the run folders among `folders`, each once; warns of others. Raises UserError where one does not exist or
    none is a run folder.
    """
    valid = f"a run folder, with a {CONFIG} or a {METRICS}"
    for folder in folders:
        if not folder.is_dir():
            raise UserError("command line: RUN", f"no such folder: {folder}", valid)
    found = {folder.resolve(): folder for folder in folders if is_run(folder)}
    others = [str(folder) for folder in folders if not is_run(folder) and folder.name != JOBS]
    if not found:
        raise UserError("command line: RUN", f"not a run folder: {', '.join(others) or folders[0]}", valid)
    if others:
        warn(f"skipped, without a {CONFIG}: {', '.join(others)}")
    return list(found.values())


def _check_out(out: Path) -> None:
    """Raises UserError where the page cannot be written, before the runs are read."""
    folder = out.absolute().parent
    if out.is_dir() or not folder.is_dir():
        raise UserError("command line: --out", f"cannot be written: {out}", "a file in a folder that exists")
    try:
        TemporaryFile(dir=folder).close()
    except OSError as failure:
        if failure.errno not in (errno.EROFS, errno.EACCES):
            raise
        what = f"cannot be written: {out}: {failure.strerror}"
        raise UserError("command line: --out", what, "--out FILE in a folder to write in") from failure


def main() -> None:
    """Runs `python -m dpo.report`."""
    arguments = read_arguments()
    runs = chosen_runs(arguments.runs)
    out = arguments.out or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT))
    _check_out(out)
    write_report(runs, out, arguments.metric)
    say(f"the page is in {out}")
