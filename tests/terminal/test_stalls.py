"""A file system that does not answer is told while it does not."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from dpo.board.writer import MetricsWriter
from dpo.terminal import console
from dpo.terminal.stalls import STALL_SECONDS, telling_stalls

Capture = pytest.CaptureFixture[str]


def lines_when(capsys: Capture, count: int) -> list[str]:
    """What was said, as soon as there are so many lines."""
    said = ""
    while said.count("\n") < count:
        said += capsys.readouterr().err
        threading.Event().wait(0.01)
    return said.splitlines()


def test_a_block_that_does_not_return_is_told_and_again(tmp_path: Path, capsys: Capture) -> None:
    """At twice and four times the limit too, not at every limit: of hours there are few lines."""
    with telling_stalls(tmp_path / "metrics.jsonl", seconds=0.25):
        lines = lines_when(capsys, 3)
    passed = [line.partition("has not answered for ")[2].partition(" s")[0] for line in lines]
    assert passed == ["0.25", "0.5", "1"]
    assert lines[0] == f"WARNING: {tmp_path}/metrics.jsonl has not answered for 0.25 s: is its file system there?"


def test_a_block_that_returns_says_nothing(tmp_path: Path, capsys: Capture) -> None:
    """Also where it fails: the threads end, which would speak after a second."""
    before = threading.active_count()
    with telling_stalls(tmp_path, seconds=3600):
        pass
    with pytest.raises(OSError), telling_stalls(tmp_path, seconds=3600):
        raise OSError
    while threading.active_count() > before:
        threading.Event().wait(0.01)
    assert capsys.readouterr().err == ""


def test_a_pipe_that_nobody_reads(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real write that does not return: metrics into a full pipe, whose reader comes late."""
    assert STALL_SECONDS == 60
    monkeypatch.setattr("dpo.board.writer.telling_stalls", lambda path: telling_stalls(path, 0.05))
    os.mkfifo(tmp_path / "metrics.jsonl")
    reader = os.open(tmp_path / "metrics.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    writer = MetricsWriter(tmp_path, [])

    def write() -> None:
        writer.write(1, {"x" * 200_000: 1.0})
        writer.close()

    done = threading.Thread(target=write)
    done.start()
    assert f"WARNING: {tmp_path}/metrics.jsonl has not answered for 0.05 s" in lines_when(capsys, 1)[0]
    assert done.is_alive()
    while done.is_alive():
        try:
            os.read(reader, 2**20)
        except BlockingIOError:
            threading.Event().wait(0.01)
    os.close(reader)


def test_a_log_that_does_not_take_a_line(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is on the terminal, and so is the warning, although the log is what waits."""
    monkeypatch.setattr("dpo.terminal.log_file.telling_stalls", lambda path: telling_stalls(path, 0.05))
    console.begin_log()
    console.open_log(tmp_path / "log.txt")
    answers, file = threading.Event(), console.LOG_FILE.file

    class Stalled:
        """The file, whose writes wait."""

        name = str(tmp_path / "log.txt")

        def write(self, line: str) -> Any:
            answers.wait()
            assert file is not None
            return file.write(line)

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    console.LOG_FILE.file = Stalled()  # type: ignore[assignment]
    saying = threading.Thread(target=console.say, args=("step 1",))
    saying.start()
    lines = lines_when(capsys, 2)
    assert lines[0] == "step 1" and f"{tmp_path}/log.txt has not answered for " in lines[1]
    answers.set()
    saying.join()
    while "has not answered" not in (tmp_path / "log.txt").read_text():
        threading.Event().wait(0.01)
    console.begin_log()
