"""The marker `quick`: tests that start no process and do not sleep, for environments at both ends of the range.

All tests of this folder are quick but for those listed here; a quick test that starts a process or
sleeps fails. conftest.py takes the hooks from here.
"""

import multiprocessing.process
import os
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest

FOLDERS = ("tests",)
"""Names of the folders whose tests are quick unless they are listed below."""

FIXTURES = ("ranks", "another_python")
"""Fixtures that start processes."""

SLOW: Sequence[str] = (
    "test_answers.py",
    "test_bad_data.py",
    "test_bad_inputs.py",
    "test_cache.py",
    "test_checkpoint.py",
    "test_choice.py::test_a_model_that",
    "test_choice.py::test_a_process",
    "test_choice.py::test_a_resumed",
    "test_choice.py::test_a_run",
    "test_config.py",
    "test_dashboard.py",
    "test_data.py",
    "test_demo.py",
    "test_disk_arrays.py",
    "test_doctor.py",
    "test_estimate.py",
    "test_export.py",
    "test_first_step",
    "test_host_copies.py",
    "test_inspect.py",
    "test_kernels.py",
    "test_metrics.py",
    "test_plan.py",
    "test_profiling.py",
    "test_provenance.py",
    "test_reference.py",
    "test_run_folder.py",
    "test_sample.py",
    "test_score.py",
    "test_summary.py",
    "test_token_rows.py",
    "test_toolchain.py::test_a_real_compiler",
    "test_toolchain.py::test_the_compiler",
    "test_versions.py",
    "test_watching.py",
)
"""Starts of the names of tests that start processes, run a training (it asks git for the commit) or wait."""

STARTERS: Sequence[tuple[Any, str]] = (
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    *((os, name) for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system")),
)
"""What starts a process in Python."""


def is_quick(folder: str, node: str, fixtures: Sequence[str]) -> bool:
    """Whether a test has the marker; `node`: `file.py::test[case]`."""
    return folder in FOLDERS and not set(FIXTURES) & set(fixtures) and not node.startswith(tuple(SLOW))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the quick tests."""
    for item in items:
        if is_quick(item.path.parent.name, f"{item.path.name}::{item.name}", getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.quick)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Holds quick tests to what the marker says, their fixtures included; other tests run as they are."""
    if item.get_closest_marker("quick") is None:
        return (yield)
    with nothing_is_started():
        return (yield)


@contextmanager
def nothing_is_started() -> Generator[None]:
    """Fails the test inside where its own thread, the main one, starts a process or sleeps: threads of pytest-xdist and
    of libraries wait as they like.
    """
    with ExitStack() as stack:
        for owner, name in STARTERS:
            stack.enter_context(
                patch.object(owner, name, _refusing(f"starts a process ({name})", getattr(owner, name)))
            )
        stack.enter_context(patch.object(time, "sleep", _refusing("sleeps", time.sleep)))
        yield


def _refusing(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return real(*args, **kwargs)
        pytest.fail(f"a quick test {what}: {args[1:] or args}; list it in tests/quick.py, SLOW")

    return refuse
