"""A test run depends on nothing that it inherits: see tests/surroundings.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROBE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests.surroundings import leave_behind
leave_behind(os.environ)
assert os.umask(0) == 0o022
left = [name for name in ("RANK", "SLURM_JOB_ID", "DPO_CACHE", "COLUMNS") if name in os.environ]
assert not left, left
assert os.environ["DPO_TEST_DATA"] == "/data"
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
os.kill(os.getpid(), signal.SIGINT)
"""


def test_what_a_run_inherits_is_left_behind() -> None:
    """Started with SIGINT, SIGHUP and SIGCHLD ignored, SIGTERM blocked, another umask and a cluster's variables; at the
    end a SIGINT reaches it as KeyboardInterrupt.
    """

    def surround() -> None:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        os.umask(0o077)

    foreign = {"RANK": "3", "SLURM_JOB_ID": "7", "DPO_CACHE": "/nowhere", "COLUMNS": "20", "DPO_TEST_DATA": "/data"}
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(ROOT)],
        env=os.environ | foreign, capture_output=True, text=True, check=False, preexec_fn=surround,
    )  # fmt: skip
    assert result.stderr.endswith("KeyboardInterrupt\n"), result.stderr
    assert "AssertionError" not in result.stderr


@pytest.mark.xdist_group("told")
def test_tests_of_a_group_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """Else each process of `make test` starts ranks, a browser and whole runs that tests share. xdist writes the group
    into a test's id, which pytest 9.2 ignores: https://github.com/pytest-dev/pytest-xdist/issues/1386.
    """
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not started by `pytest -n 2 --dist loadgroup`, as by make test")
    assert request.node.nodeid.endswith("@told")
