"""Lines and bars on a terminal, in a pipe, and in the log of a run."""

import errno
import io
import logging.handlers
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dpo.command.exits import tell_error, tell_stop
from dpo.terminal import console
from dpo.terminal.console import begin_log, log_alone, open_log, progress, say, set_quiet, unsaid, warn
from dpo.terminal.log_file import LogFile
from tests.support.screen import Screen, terminal

HOSTILE = "a [red]line[/red] [/]\x1b[2J\r\u202eback\nnext\ttab"
"""A user's text: markup of rich, a sequence that clears a screen, a return, a change of direction, a second line."""
HARMLESS = "a [red]line[/red] [/]␛[2J␍<U+202E>back↵next\ttab"


def test_elsewhere_a_record_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    warn("low")
    tell_error("wrong")
    assert capsys.readouterr() == ("", f"{HARMLESS}\nWARNING: low\nerror: wrong\n")


def test_every_handler_can_encode_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    """A path that is no UTF-8 has surrogates in Python; a program that embeds a run has handlers of its own."""
    seen = logging.handlers.BufferingHandler(10)
    console.LOG.addHandler(seen)
    try:
        say("runs/my\udcffrun")
    finally:
        console.LOG.removeHandler(seen)
    assert [record.getMessage() for record in seen.buffer] == ["runs/my<U+DCFF>run"]
    assert capsys.readouterr().err == "runs/my<U+DCFF>run\n"


def test_a_terminal_shows_every_character_as_it_is() -> None:
    """The tab ends at column 8 of its own line; no markup is read."""
    with terminal() as screen:
        say(HOSTILE)
    assert screen.shown == [HARMLESS.expandtabs(8)]


@pytest.mark.parametrize(
    ("line", "styled", "style"),
    [
        ("WARNING: low", "WARNING:", "1;33"),
        ("error: wrong", "error:", "1;31"),
        ("model      a folder", "model", "1;36"),
        ("step  1/20  loss 0.69", "step  1/20", "1;36"),
        ("data: reading", "", ""),
        ("  format texts", "", ""),
    ],
)
def test_colors_of_a_terminal(line: str, styled: str, style: str) -> None:
    """Yellow 33, red 31, cyan 36, each bold; nothing else of a line has a style."""
    with terminal() as screen:
        console.tell(line)
    expected = line.replace(styled, f"\x1b[{style}m{styled}\x1b[0m", 1) if styled else line
    assert screen.sent == f"{expected}\r\n"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_color_where_none_is_wanted(environment: dict[str, str]) -> None:
    with terminal(**environment) as screen:
        warn("low")
        tell_error("wrong")
    assert not re.search(r"\x1b\[[\d;]*3\d", screen.sent)
    assert screen.shown == ["WARNING: low", "error: wrong"]


def test_quiet_silences_say_alone(capsys: pytest.CaptureFixture[str]) -> None:
    set_quiet(True)
    say("unheard")
    warn("heard")
    tell_stop("")
    with progress("reference", 2, "rows", shown=True) as bar:
        bar.advance(2)
    assert capsys.readouterr().err == "WARNING: heard\nstopped\n"


# --- bars ------------------------------------------------------------------------------------------------------------


def train(columns: int, has_lines: bool = True) -> Screen:
    """A bar of 20 steps, the first 10 of which are done before, with a line after every fifth and one warning."""
    shown = progress("train", 20, "steps", True, done=10, lines_elsewhere=not has_lines)
    with terminal(columns) as screen, shown as bar:
        for step in range(11, 21):
            bar.advance(1)
            if step % 5 == 0 and has_lines:
                say(f"step {step}/20  " + "loss 0.6931  " * 6)
        print("a library's warning", file=sys.stderr)
    return screen


def states(screen: Screen) -> list[list[str]]:
    """What the terminal showed after each line feed or return; the cursor is always there, as for a killed process."""
    again, found = Screen(screen.columns), []
    for part in re.split(r"(?<=[\r\n])", screen.sent):
        again.feed(part)
        found.append(again.shown)
        assert again.has_cursor
    return found


@pytest.mark.parametrize("columns", [100, 40, 12])
def test_the_bar_is_below_the_lines_and_leaves_nothing(columns: int) -> None:
    """In the end the lines alone, wrapped by the terminal where it is narrow; before, one bar at a time, below them."""
    screen = train(columns)
    said = [f"step {step}/20  " + "loss 0.6931  " * 6 for step in (15, 20)] + ["a library's warning"]
    assert screen.shown == [
        part for line in said for part in (line[i : i + columns].rstrip() for i in range(0, len(line), columns)) if part
    ]
    for shown in states(screen):
        bars = [number for number, line in enumerate(shown) if "━" in line]
        assert len(bars) <= 1 and all(number == len(shown) - 1 for number in bars)


def test_what_the_bar_says() -> None:
    """Of a phase without lines the time that is left; the lines of training have it, so its bar has the time so far."""
    bars = {line for shown in states(train(100)) for line in shown if "━" in line}
    assert any(re.fullmatch(r"train ━+ 20/20 steps \d:\d\d:\d\d", line) for line in bars)
    assert not any("eta" in line for line in bars)
    bars = {line for shown in states(train(100, has_lines=False)) for line in shown if "━" in line}
    assert any(re.fullmatch(r"train ━+ 20/20 steps eta \d:\d\d:\d\d", line) for line in bars)


def test_a_dumb_terminal_has_lines_and_no_bar() -> None:
    with terminal(name="dumb") as screen, progress("reference", 2, "rows", shown=True) as bar:
        bar.advance(1)
        bar.advance(1)
    assert screen.sent == "reference: 2/2 rows\r\n"


def test_a_terminal_that_is_closed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither before nor within a bar, nor where one ends."""
    terminal, there = os.openpty()
    stderr = os.fdopen(there, "w")
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    with progress("train", 3, "steps", shown=True) as bar:
        bar.advance(1)
        assert bar.bar
        os.close(terminal)
        say("one")
        bar.advance(2)
    with progress("evaluate", 1, "pairs", shown=True) as bar:
        bar.advance(1)
    with pytest.raises(OSError, match="Input/output error"):
        stderr.close()  # it writes what is kept


def test_in_a_pipe_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """After more than ten seconds, and at the end."""
    times = iter([100.0, 109.0, 111.0, 111.0, 112.0, 122.0, 122.0, 123.0])  # two where a line is said
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    with progress("reference", 5, "rows", shown=True) as bar:
        for _ in range(5):
            bar.advance(1)
    assert capsys.readouterr().err == "reference: 2/5 rows\nreference: 4/5 rows\nreference: 5/5 rows\n"


# --- the log of a run ------------------------------------------------------------------------------------------------


def told(path: Path) -> list[str]:
    """The lines of a log, whose time stamps are cut off; fails where a line has none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines), lines
    return [line[21:] for line in lines]


def test_the_log_has_everything_from_the_start(tmp_path: Path) -> None:
    """What was said before the folder was known, what --quiet silenced, the error at the end; each once."""
    begin_log()
    say("early")
    set_quiet(True)
    say("[bold]quiet[/bold]\x1b[2J\nnext")
    open_log(tmp_path / "run" / "log.txt")
    warn("late")
    tell_error("wrong")
    log_alone("Traceback:\n  File x\nKeyError: 1")
    expected = ["early", "[bold]quiet[/bold]␛[2J↵next", "WARNING: late", "error: wrong"]
    assert told(tmp_path / "run" / "log.txt") == [*expected, "Traceback:", "  File x", "KeyError: 1"]


def test_what_another_process_says_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the log, too; warnings and what is said later stay."""
    begin_log()
    with unsaid():
        say("twice")
        warn("heard")
    say("later")
    open_log(tmp_path / "log.txt")
    assert capsys.readouterr().err == "WARNING: heard\nlater\n"
    assert told(tmp_path / "log.txt") == ["WARNING: heard", "later"]


def test_a_line_is_stamped_with_its_own_time(tmp_path: Path) -> None:
    """A minute passes before the folder is known."""
    begin_log()
    record, wall = console.LOG.makeRecord("dpo", 20, "", 0, "early", (), None), time.time()
    record.created = wall - 60
    console.LOG_FILE.handle(record)
    open_log(tmp_path / "log.txt")
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall - 60))
    assert (tmp_path / "log.txt").read_text() == f"{stamp}  early\n"


def test_a_second_run_of_this_process_has_a_log_of_its_own(tmp_path: Path) -> None:
    """Also where it never gets to a folder."""
    first, second = tmp_path / "first" / "log.txt", tmp_path / "second" / "log.txt"
    begin_log()
    open_log(first)
    say("one")
    begin_log()
    say("a run that is refused")
    begin_log()
    say("two")
    open_log(second)
    say("three")
    begin_log()
    say("four")
    assert (told(first), told(second)) == (["one"], ["two", "three"])


def test_a_further_start_appends(tmp_path: Path) -> None:
    for line in ("one", "two"):
        begin_log()
        say(line)
        open_log(tmp_path / "log.txt")
    assert told(tmp_path / "log.txt") == ["one", "two"]


class Full(io.StringIO):
    """A file on a disk without room."""

    name = "/runs/x/log.txt"

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_once_and_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    console.LOG_FILE.file = Full()
    say("one")
    say("two")
    lines = capsys.readouterr().err.splitlines()
    said = "WARNING: the log lacks lines from here on: the disk is full: cannot write /runs/x/log.txt, 25 bytes: "
    assert [line for line in lines if not line.startswith(said)] == ["one", "two"] and len(lines) == 3


def test_a_log_that_cannot_be_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    open_log(tmp_path / "file" / "log.txt")
    assert "WARNING: the log lacks lines from here on: " in capsys.readouterr().err


# --- imports ---------------------------------------------------------------------------------------------------------


def test_a_line_in_a_pipe_costs_no_import_of_rich() -> None:
    code = (
        "import sys; from dpo.terminal.console import say; say('x'); print({'rich', 'tqdm', 'torch'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\n", "x\n")


def test_the_states_of_a_screen_are_told_apart() -> None:
    """What the tests above rest on: a bar that stays would be seen."""
    screen: Any = Screen(10)
    screen.feed("━━ 1\r\x1b[2Kline\r\n━━ 2")
    assert screen.shown == ["line", "━━ 2"]


def test_a_long_log_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log keeps the newest lines, up to twice its limit: 100 lines of 29 bytes, of which a file holds some 32."""
    path = tmp_path / "log.txt"
    log = LogFile(max_bytes=1000)
    log.write_to(path)
    for number in range(100):
        log.handle(logging.makeLogRecord({"msg": f"{number:07}", "levelno": logging.INFO}))
    log.begin()
    earlier, newest = ((tmp_path / name).read_text().splitlines() for name in ("log.1.txt", "log.txt"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.1.txt", "log.txt"]
    assert all((tmp_path / name).stat().st_size < 1100 for name in ("log.1.txt", "log.txt"))
    lines = [line[21:] for line in earlier + newest]
    said = "the log before is in log.1.txt: it had 0.001 MB"
    assert lines.count(said) == 2 and newest[0].endswith(said)
    numbers = [int(line) for line in lines if line != said]
    assert numbers == list(range(100 - len(numbers), 100)) and len(numbers) > 32


def test_a_log_that_was_long_before_begins_anew(tmp_path: Path) -> None:
    """Over all starts of a run."""
    path = tmp_path / "log.txt"
    for number in range(40):
        log = LogFile(max_bytes=300)
        log.write_to(path)
        log.handle(logging.makeLogRecord({"msg": f"{number:07}", "levelno": logging.INFO}))
        log.begin()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 800
    assert path.read_text().splitlines()[-1].endswith("0000039")
