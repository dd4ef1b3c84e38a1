"""Why a rank failed, in the file where torchrun and the launcher look for it."""

import json
import sys
import time
from pathlib import Path

import pytest

from dpo.base.errors import RunError, UserError
from dpo.distributed.program import run_program
from launch.failures import failures_of_node


def recorded(failure: Exception, path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int | None, dict]:
    """(exit code, or None where the exception went on; what stands in the file)."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))

    def main() -> None:
        raise failure

    try:
        code = run_program(main)
    except type(failure):
        code = None
    return code, json.loads(path.read_text())["message"]


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (UserError("loss.beta", "wrong", "right"), 2),
        (RunError("step 3: the gradient norm is nan"), 1),
        (OSError("No space left on device"), 1),
        (ZeroDivisionError("a bug"), None),
    ],
)
def test_every_failure_is_recorded(
    failure: Exception, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind, message and time, the latter more exact than torch's whole seconds; of bugs alone the traceback, which
    torchrun prints."""
    before = time.time()
    found, message = recorded(failure, tmp_path / "error.json", monkeypatch)
    assert found == code
    assert message["message"] == f"{type(failure).__name__}: {failure}"
    extra = message["extraInfo"]
    assert ("in main\n    raise failure" in extra["py_callstack"]) == (code is None)
    assert before <= extra["seconds"] <= time.time() and extra["timestamp"] == str(int(extra["seconds"]))
    assert extra["seconds"] != int(extra["seconds"])


@pytest.mark.parametrize(
    ("failure", "user_line", "exit_code", "shown"),
    [
        (UserError("loss.beta", "bad", "good"), "a.yaml: loss.beta: bad; valid: good", 2, "{user_line}"),
        (UserError("a.jsonl:3", "bad"), "a.jsonl:3: bad", 2, "{user_line}"),
        (RunError("step 3: nan"), "step 3: nan", 1, "rank 0 on host: {user_line}"),
        (OSError("No space left on device"), "", 1, "rank 0 on host: OSError: No space left on device"),
    ],
)
def test_the_launcher_reads_what_a_rank_was_told(
    failure: Exception, user_line: str, exit_code: int, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that the rank prints, with the file that gave the key, and its exit code: from fields of the file, not
    from the words of the message.
    """
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("loss: {beta: 2}")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "a.yaml"])
    path = tmp_path / "none_x" / "attempt_0" / "0" / "error.json"
    path.parent.mkdir(parents=True)
    recorded(failure, path, monkeypatch)
    (found,) = failures_of_node(tmp_path, tmp_path / "torchrun.json", "", "host", first_rank=0)
    assert (found.user_line, found.exit_code, found.traceback) == (user_line, exit_code, "")
    assert found.is_users == (exit_code == 2)
    assert str(found) == shown.format(user_line=user_line)


def test_nothing_is_written_where_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)

    def main() -> None:
        raise UserError("loss.beta", "wrong")

    assert run_program(main) == 2
    assert not list(tmp_path.iterdir())
