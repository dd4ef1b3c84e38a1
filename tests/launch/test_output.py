"""The log of a job is bounded: what a person needs, the first lines and the newest, is kept."""

import errno
import os
from pathlib import Path

import pytest

from launch.output import Output
from launch.reports import ATTEMPTS, Attempt

LINE = "x" * 9 + "\n"


def test_the_first_lines_stay_in_the_log_and_the_newest_in_two_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 34 lines of 10 bytes, with 50 bytes for each file: the log has 5, the last two files the last 9."""
    output = Output(tmp_path / "node-0.later.txt", max_bytes=50)
    for number in range(34):
        output.write(f"line {number:4}\n")
    output.close()
    said = capsys.readouterr().err.splitlines()
    numbers = [int(line.split()[1]) for line in said if line.startswith("line ")]
    later, before = (
        [int(line.split()[1]) for line in (tmp_path / f"node-0.{name}.txt").read_text().splitlines()]
        for name in ("later", "before")
    )
    assert (numbers, before, later) == ([*range(5)], [*range(25, 30)], [*range(30, 34)])
    told = [line for line in said if not line.startswith("line ")]
    assert told == [
        f"the log has 0.0 KiB of this start: the output that follows is in {tmp_path}/node-0.later.txt",
        f"the newest output of the ranks is in {tmp_path}/node-0.later.txt",
    ]


def test_a_log_that_is_short_has_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(tmp_path / "later.txt", max_bytes=50)
    for _ in range(5):
        output.write(LINE)
    output.close()
    assert capsys.readouterr().err == 5 * LINE
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_made_the_lines_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is said once, so that the log grows no faster, and their number at the end."""
    later = tmp_path / "none" / "later.txt"
    output = Output(later, max_bytes=10)
    for _ in range(4):
        output.write(LINE)
    output.close()
    assert capsys.readouterr().err.splitlines() == [
        "x" * 9,
        f"the log has 0.0 KiB of this start: the output that follows is left out, since {later} cannot be made: No "
        "such file or directory",
        "3 lines of the output of the ranks are left out",
    ]


@pytest.mark.parametrize("fails", ["close", "replace"])
def test_a_full_disk_at_a_new_file_does_not_end_the_output(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 40 bytes of a start, with 10 for each file, the newest are in the newest file."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = Output(tmp_path / "node-0.later.txt", max_bytes=10)
    output.write(LINE)
    output.write(LINE)
    assert output.file
    if fails == "close":  # closed, and its last bytes do not fit on the disk
        output.file.close()
        monkeypatch.setattr(output.file, "close", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    output.write(LINE)
    output.write("newest...\n")
    output.close()
    assert (tmp_path / "node-0.later.txt").read_text() == "newest...\n"
    assert "left out" not in capsys.readouterr().err


def test_lines_after_the_end_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A process that a rank left behind keeps the pipe open: the thread that reads it must not raise."""
    output = Output(tmp_path / "later.txt", max_bytes=10)
    output.write(LINE)
    output.write(LINE)
    file = output.file
    output.close()
    output.write(LINE)
    assert (tmp_path / "later.txt").read_text() == LINE
    output.file, output.size = file, 0  # as it is for the thread where `close` comes in the middle of `write`
    output.write(LINE)
    assert capsys.readouterr().err.count(LINE) == 1


def test_reports_of_the_first_and_the_last_starts_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that is preempted again and again; the reports of each start are removed once."""
    for number in range(2 * ATTEMPTS + 5):
        attempt = Attempt(tmp_path, number)
        attempt.remove_others()
        attempt.log_dir(0).mkdir(parents=True)
    kept = [number for number in range(2 * ATTEMPTS + 5) if (tmp_path / f"attempt-{number}").exists()]
    last = 2 * ATTEMPTS + 4
    assert kept == [*range(ATTEMPTS), *range(last - ATTEMPTS, last + 1)]
    told = capsys.readouterr().err.splitlines()
    assert told == [f"removed attempt-{ATTEMPTS + i} of {tmp_path}, the reports of starts long ago" for i in range(4)]
