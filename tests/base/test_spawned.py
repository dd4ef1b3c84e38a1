"""A function in a spawned process: its result, its failures, and its end."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo.base.errors import RunError, UserError
from dpo.base.spawned import in_own_process

ROOT = Path(__file__).parents[2]
USERS = UserError("model.path", "so it is", "another")


def fail(failure: Exception) -> None:
    raise failure


def die(*_: Any) -> None:
    """As the kernel ends a process where a machine has no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_and_failures() -> None:
    assert in_own_process(max, 3, 7) == 7
    with pytest.raises(UserError, match=r"^model\.path: so it is; valid: another$"):
        in_own_process(fail, USERS)
    with pytest.raises(RunError, match=r"^ValueError: so it is \(base/test_spawned\.py:\d+ in fail\)$"):
        in_own_process(fail, ValueError("so it is"))
    with pytest.raises(RunError, match=r"^its process ended without a result, with exit code -9$"):
        in_own_process(die)


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """Else it would hold the output of a job whose rank 0 was killed: `communicate` would not return."""
    (tmp_path / "program.py").write_text("""
from dpo.base.spawned import in_own_process

if __name__ == "__main__":
    in_own_process(exec, "import time; print('it runs', flush=True); time.sleep(600)")
""")
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == "it runs\n"
    process.kill()
    assert process.communicate(timeout=120) == ("", None)
