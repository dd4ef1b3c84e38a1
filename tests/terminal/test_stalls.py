"""A file system that does not answer is told while it does not."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
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
    """Also where it fails. One thread watches over all blocks of a process, one within another too."""
    with telling_stalls(tmp_path, seconds=3600):
        before = threading.active_count()
    for _ in range(100):
        with telling_stalls(tmp_path, seconds=3600), telling_stalls(tmp_path / "log.txt", seconds=3600):
            assert threading.active_count() == before
    with pytest.raises(OSError), telling_stalls(tmp_path, seconds=3600):
        raise OSError
    assert threading.active_count() == before
    assert capsys.readouterr().err == ""


def test_of_several_blocks_each_is_told_at_its_time(tmp_path: Path, capsys: Capture) -> None:
    """The later one has the earlier limit; the one that has returned is not told."""
    with telling_stalls(tmp_path / "slow", seconds=0.6), telling_stalls(tmp_path / "fast", seconds=0.25):
        with telling_stalls(tmp_path / "good", seconds=0.3):
            pass
        lines = lines_when(capsys, 3)
    told = [line.split(" has not answered for ") for line in lines]
    assert [(Path(path).name, after.split(" ")[0]) for path, after in told] == [
        ("fast", "0.25"),
        ("fast", "0.5"),
        ("slow", "0.6"),
    ]


FORK = """
import os, sys, threading
from dpo.terminal import console
from dpo.terminal.stalls import telling_stalls
with telling_stalls("parent", seconds=3600):
    child = os.fork()
    if child == 0:
        with telling_stalls("child", seconds=0.05):
            sys.stdin.read()
        os._exit(0)
    sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_block_of_a_forked_process_is_told() -> None:
    """It has no thread of its parent, and starts its own."""
    words = [sys.executable, "-W", "ignore", "-c", FORK]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stderr
        assert process.stderr.readline() == "WARNING: child has not answered for 0.05 s: is its file system there?\n"
        process.stdin.close()
    assert process.returncode == 0


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
    log = (tmp_path / "log.txt").read_text()
    assert f"WARNING: {tmp_path}/log.txt has answered after " in log and "has not answered" not in log
    console.begin_log()


def test_while_the_log_stalls_others_are_told(tmp_path: Path, capsys: Capture) -> None:
    """The stalled thread holds the lock of the log: who watches does not wait for it."""
    console.LOG_FILE.acquire()
    try:
        with telling_stalls(tmp_path / "first", seconds=0.05):
            assert "first has not answered for 0.05 s" in lines_when(capsys, 1)[0]
        watched = threading.Event()

        def stall() -> None:
            with telling_stalls(tmp_path / "second", seconds=0.05):
                watched.wait()

        stalled = threading.Thread(target=stall)
        stalled.start()
        while "second has not answered for 0.05 s" not in capsys.readouterr().err:
            threading.Event().wait(0.01)
        watched.set()
    finally:
        console.LOG_FILE.release()
    stalled.join()


def test_a_line_of_metrics_is_watched_and_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is read over the network: once for the line and its points in all sinks together."""
    calls: list[str] = []

    def noted(path: Path) -> Any:
        calls.append("watched")
        return telling_stalls(path)

    sink = SimpleNamespace(metrics=lambda step, metrics: calls.append("shown"), close=lambda ending: None)
    monkeypatch.setattr("dpo.board.writer.telling_stalls", noted)
    with MetricsWriter(tmp_path, [sink] * 2, lambda: calls.append("checked")) as writer:  # type: ignore[list-item]
        writer.write(1, {"train/loss": 1.0})
        assert calls == ["watched", "checked", "shown", "shown"]
