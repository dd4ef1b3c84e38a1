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

FOLDERS = (
    "tests",
    "adapters",
    "base",
    "batch",
    "board",
    "checkpoint",
    "command",
    "commands",
    "config",
    "disk",
    "distributed",
    "encode",
    "estimate",
    "front",
    "hub",
    "inspect",
    "machine",
    "model",
    "pairs",
    "ref_logps",
    "report",
    "run",
    "run_folder",
    "sources",
    "step",
    "terminal",
    "train",
    "watch",
)
"""Names of the folders whose tests are quick unless they are listed below."""

FIXTURES = ("ranks", "another_python")
"""Fixtures that start processes."""

SLOW: Sequence[str] = (
    "adapters/test_model_paths.py::test_a_repository",
    "adapters/test_model_paths.py::test_adapters_of_the_hub",
    "adapters/test_reading.py::test_pickled",
    "adapters/test_reference.py",
    "adapters/test_runs.py",
    "base/test_arrays.py",
    "base/test_processes.py",
    "base/test_spawned.py",
    "base/test_workers.py",
    "batch/test_plan.py",
    "board/test_dashboard.py",
    "board/test_watching.py",
    "checkpoint/test_checkpoint.py",
    "checkpoint/test_export.py",
    "checkpoint/test_export_adapters.py",
    "checkpoint/test_failed_checkpoint.py::test_killed_before_any_change",
    "checkpoint/test_host_copies.py",
    "checkpoint/test_lora.py",
    "command/test_exits.py",
    "commands/test_demo.py",
    "commands/test_doctor.py",
    "commands/test_doctor_report.py",
    "commands/test_export_merge.py",
    "commands/test_prepare.py",
    "commands/test_reference.py",
    "commands/test_replay.py",
    "commands/test_sample.py",
    "commands/test_score.py",
    "commands/test_wheel.py",
    "config/test_bad_inputs.py",
    "config/test_config.py",
    "disk/test_sizes.py",
    "estimate/test_choice.py::test_a_model_that",
    "estimate/test_choice.py::test_a_resumed",
    "estimate/test_choice.py::test_a_run",
    "estimate/test_estimate.py",
    "front/test_api.py",
    "front/test_completion.py::test_a_word",
    "front/test_stops.py",
    "front/test_train.py",
    "front/test_words.py",
    "inspect/test_inspect.py",
    "machine/test_toolchain.py::test_a_real_compiler",
    "machine/test_toolchain.py::test_the_compiler",
    "machine/test_versions.py",
    "model/test_kernels.py",
    "pairs/test_bad_data.py",
    "pairs/test_damaged_caches.py::test_every_file_of_token_rows",
    "pairs/test_pair_values.py::test_values_of_every_kind_of_file",
    "pairs/test_prepare.py",
    "pairs/test_shares.py::test_the_choice_is_by_content",
    "pairs/test_token_rows.py",
    "ref_logps/test_blocks.py",
    "ref_logps/test_reference.py",
    "run/test_answers.py",
    "run/test_answers_of_adapters.py",
    "run/test_card.py::test_a_card_of_odd",
    "run/test_card.py::test_a_card_that_fails",
    "run/test_card.py::test_adapters_have",
    "run/test_card.py::test_damaged",
    "run/test_card.py::test_final",
    "run/test_folder.py",
    "run/test_machine.py",
    "run/test_provenance.py",
    "run_folder/test_holder.py::test_an_ended",
    "run_folder/test_lock.py::test_processes",
    "sources/test_caching.py",
    "sources/test_hub_sums.py",
    "step/test_first_step",
    "step/test_loss_seam.py",
    "step/test_metrics.py",
    "step/test_pair_weights.py",
    "terminal/test_console.py::test_a_line_in_a_pipe_costs",
    "terminal/test_stalls.py::test_a_block_of_a_forked",
    "tests/test_surroundings.py",
    "train/test_imports.py",
    "train/test_log.py",
    "train/test_phases.py::test_a_resumed",
    "train/test_profiling.py",
    "train/test_sft.py",
    "train/test_spikes.py::test_a_run",
    "train/test_summary.py",
    "watch/test_signs.py",
)
"""Starts of the names of tests that start processes, run a training (it asks git for the commit) or wait."""

STARTERS: Sequence[tuple[Any, str]] = (
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    *((os, name) for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system")),
)
"""What starts a process in Python."""


def is_quick(folder: str, node: str, fixtures: Sequence[str]) -> bool:
    """Whether a test has the marker; `node`: `folder/file.py::test[case]`."""
    return folder in FOLDERS and not set(FIXTURES) & set(fixtures) and not node.startswith(tuple(SLOW))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the quick tests."""
    for item in items:
        if is_quick(
            item.path.parent.name,
            f"{item.path.parent.name}/{item.path.name}::{item.name}",
            getattr(item, "fixturenames", ()),
        ):
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
