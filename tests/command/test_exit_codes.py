"""How programs end: exit codes, the line of the error; and --quiet."""

import sys

import pytest

from dpo.base.errors import RunError, UserError
from dpo.command.exits import run_program
from dpo.terminal.console import is_quiet, set_quiet


@pytest.mark.parametrize(
    ("failure", "code", "told"),
    [
        (None, 0, ""),
        (
            UserError("command line: --out", "is a\nfile", "a folder"),
            2,
            "command line: --out: is a file; valid: a folder",
        ),
        (RunError("it does\n not fit"), 1, "it does not fit"),
        (FileNotFoundError(2, "No such file", "a"), 1, "FileNotFoundError: [Errno 2] No such file: 'a'"),
        (RunError("a model wrote \x1b[2J"), 1, "a model wrote ␛[2J"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_exit_codes(
    failure: BaseException | None, code: int, told: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the README lists them; the error is one line, which cannot steer a terminal. Ctrl-C is no error."""

    def main() -> None:
        if failure is not None:
            raise failure

    assert run_program(main) == code
    stopped = "stopped\n" if code == 130 else ""
    assert capsys.readouterr().err == (f"error: {told}\n" if told else stopped)


def test_after_ctrl_c_a_program_says_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    assert run_program(main, "the same command resumes") == 130
    assert capsys.readouterr().err == "stopped; the same command resumes\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("words", "is_asked"),
    [("--quiet --nodes 2", True), ("--nodes 2", False), ("--name=--quiet", False), ("--quiet=no", False)],
)
def test_quiet(words: str, is_asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *words.split()])
    found: list[bool] = []
    try:
        run_program(lambda: found.append(is_quiet()))
    finally:
        set_quiet(False)
    assert found == [is_asked]
