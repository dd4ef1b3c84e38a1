"""Two starts in one run folder, as real processes: one of them runs, the other is refused before it writes anything.

The steps of a run under test wait for a file, `go`, before step 4: until then the folder is in use.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from dpo.checkpoint import export as exporting
from dpo.checkpoint import store
from dpo.config import Config, to_yaml
from dpo.run_folder.lock import entries_of
from dpo.train import hold, program
from tests.faults.test_killed import MAIN
from tests.support.checkpoints import newest_checkpoint
from tests.support.processes import start_program
from tests.support.ranks import _free_port
from tests.support.runs import (
    changed,
    error_lines,
    exit_code,
    logged,
    run,
    same_weights,
    save_six_steps,
    six_steps,
    train_lines,
    without_clock,
)

pytestmark = pytest.mark.xdist_group("two-starts")

WAITING = """
import os, time
from dpo.train import loop
step = loop._step
def wait_and_step(run, number, *others):
    while number == 4 and not os.path.exists(GO):
        time.sleep(0.02)
    return step(run, number, *others)
loop._step = wait_and_step
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl, eval.jsonl, and whole/, the run of a folder of its own."""
    folder = save_six_steps(tmp_path_factory.mktemp("two-starts"))
    run(six_steps(folder, folder / "whole"))
    return folder


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Config:
    return six_steps(root, tmp_path / "run")


def begin(config: Config, name: str, go: Path, **environment: str) -> tuple[BaseProcess, Path]:
    """A start in a process of its own, and the file of its stderr."""
    words = Path(str(config.train.run_dir)).with_name(f"{name}.yaml")
    words.write_text(to_yaml(config))
    stderr = words.with_suffix(".stderr")
    with pytest.MonkeyPatch.context() as here:
        for key, value in environment.items():
            here.setenv(key, value)
        return start_program(WAITING + MAIN, ["--config", str(words)], stderr, GO=str(go)), stderr


def until(is_so: Callable[[], bool], process: BaseProcess, stderr: Path) -> None:
    while not is_so():
        assert process.is_alive(), stderr.read_text()[-3000:]
        time.sleep(0.02)


@contextmanager
def held(config: Config, size: int = 1) -> Iterator[tuple[list[BaseProcess], list[Path], Path]]:
    """A run that has made step 3: its ranks, their stderr, and the file for which they wait. They are killed after."""
    run_dir = Path(str(config.train.run_dir))
    go, port = run_dir.with_name("go"), str(_free_port())
    ranks: list[dict[str, str]] = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(size)
    ]  # fmt: skip
    started = [begin(config, f"first-{rank}", go, **(env if size > 1 else {})) for rank, env in enumerate(ranks)]
    processes, stderr = [process for process, _ in started], [path for _, path in started]
    try:
        until(lambda: (run_dir / "metrics.jsonl").exists() and len(train_lines(run_dir)) == 3, processes[0], stderr[0])
        until(lambda: newest_checkpoint(run_dir) is not None, processes[0], stderr[0])
        yield processes, stderr, go
    finally:
        for process in processes:
            process.kill()
            process.join()


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder with its bytes, and every folder in it."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_whole(run_dir: Path, root: Path) -> None:
    assert without_clock(train_lines(run_dir)) == without_clock(train_lines(root / "whole"))
    assert same_weights(run_dir / "final", root / "whole" / "final")
    assert not (run_dir / "lock").exists()


# --- refused ---------------------------------------------------------------------------------------------------------

SECONDS: list[dict[str, Any]] = [
    {},
    {"optim__lr": 5e-4},
    {"checkpoint__resume": "never"},
    {"train__steps": 2},
    {"train__steps": 9},
    {"batch__pairs_per_step": 2},
    {"checkpoint__keep": 1},
    {"data__eval": []},
    {"loss__beta": 0.5},
]


def test_nine_second_starts_are_refused(
    config: Config, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first look, and where that saw nothing, before anything is written: of whatever config, also of another
    run. The first one is not disturbed: it ends as if it had been alone.
    """
    with held(config) as ((first,), (stderr,), go):
        before = contents(tmp_path / "run")
        for looks in (True, False):
            with monkeypatch.context() as here:
                if not looks:
                    here.setattr(hold, "_refuse", lambda _: None)
                for changes in SECONDS if looks else SECONDS[:2]:
                    assert exit_code(changed(config, **changes)) == 2
                    (error,) = error_lines(capsys.readouterr().err)
                    assert error.startswith(
                        f"error: CONFIG: train.run_dir: {tmp_path}/run is in use by process {first.pid} "
                    )
                    assert contents(tmp_path / "run") == before
        go.touch()
        first.join()
        assert first.exitcode == 0, stderr.read_text()[-3000:]
    assert_whole(tmp_path / "run", root)


def test_of_two_starts_at_once_one_runs(config: Config, root: Path, tmp_path: Path) -> None:
    """Both find an empty folder."""
    go = tmp_path / "go"
    go.touch()
    started = [begin(config, name, go) for name in ("one", "other")]
    for process, _ in started:
        process.join()
    said = {process.exitcode: stderr.read_text() for process, stderr in started}
    if 2 in said:
        assert said.keys() == {0, 2}
        (error,) = error_lines(said[2])
        assert "is in use by process " in error
    else:  # the other began when the first had ended
        assert said.keys() == {0} and any("is finished" in stderr.read_text() for _, stderr in started)
    assert_whole(tmp_path / "run", root)


def test_a_finished_run_is_told_as_such_whoever_holds_the_folder(
    config: Config, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waits for its tracker, say. Nothing is locked for what is only read."""
    run(config)
    with hold.holding(tmp_path / "run", hold.this_process({})):
        before = contents(tmp_path / "run")
        assert exit_code(config) == 0
        assert "is finished: its 6 steps are done" in capsys.readouterr().err
        assert exit_code(changed(config, train__steps=9)) == 2
        assert " is in use by process " in capsys.readouterr().err
        assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("changes", [{"batch__pairs_per_step": 9}, {"checkpoint__keep": 0}])
def test_a_start_that_is_refused_for_its_input_leaves_no_lock(
    config: Config, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert exit_code(changed(config, **changes)) == 2
    assert not (tmp_path / "run").exists()


def test_what_another_start_did_meanwhile_counts(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes all six steps while this one reads its input, which first found an empty folder: nothing is left."""
    read = program.read_inputs

    def read_slowly(*args: Any) -> Any:
        inputs = read(*args)
        go = tmp_path / "go"
        go.touch()
        process, stderr = begin(config, "other", go)
        process.join()
        assert process.exitcode == 0, stderr.read_text()[-3000:]
        return inputs

    monkeypatch.setattr(program, "read_inputs", read_slowly)
    assert exit_code(config) == 0
    assert "is finished: its 6 steps are done" in capsys.readouterr().err
    assert len(train_lines(tmp_path / "run")) == 6
    assert not list((tmp_path / "run").glob("*.old"))


# --- taken over ------------------------------------------------------------------------------------------------------


def test_the_next_start_after_a_kill_takes_over_at_once(config: Config, root: Path, tmp_path: Path) -> None:
    with held(config) as ((first,), _, _):
        first.kill()
        first.join()
        assert entries_of(tmp_path / "run")
        run(config)
    taken = f"{tmp_path}/run is taken over from process {first.pid} on "
    (line,) = [line for line in logged(tmp_path / "run") if line.startswith(taken)]
    assert line.endswith(": that process has ended")
    assert_whole(tmp_path / "run", root)


@pytest.mark.parametrize("size", [1, 2])
def test_a_holder_that_wakes_up_after_ten_minutes_writes_nothing_more(
    config: Config, root: Path, tmp_path: Path, size: int
) -> None:
    """Stopped before step 4, taken over and finished by another start. It ends with 1, all its ranks do, and the folder
    stays that of the other, but for the line in the log that says so.
    """
    with held(config, size) as (processes, stderr, go):
        for process in processes:
            os.kill(process.pid or 0, signal.SIGSTOP)
        (lock,) = entries_of(tmp_path / "run")
        os.utime(lock.path, (lock.changed - 601,) * 2)
        run(config)
        before = contents(tmp_path / "run")
        go.touch()
        for process in processes:
            os.kill(process.pid or 0, signal.SIGCONT)
        processes[0].join()
        (error,) = error_lines(stderr[0].read_text())
        assert error.startswith(f"error: train.run_dir: {tmp_path}/run is not this run's any more")
        for process in processes[1:]:
            process.join()
        assert [process.exitcode for process in processes] == [1] * size
    after = contents(tmp_path / "run")
    changed_files = {Path(path).name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed_files <= {"log.txt"}
    if size == 1:
        assert_whole(tmp_path / "run", root)


@pytest.mark.parametrize(
    ("module", "name", "call", "steps"),
    [(exporting, "_write_card", 1, [2, 4, 6]), (store, "_make_draft", 3, [2, 4])],
    ids=["export", "checkpoint"],
)
def test_a_holder_that_lost_its_folder_while_it_writes(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    module: Any, name: str, call: int, steps: list[int],
) -> None:  # fmt: skip
    """The exported model, or the third and last checkpoint, does not get its name."""
    real, calls = getattr(module, name), []

    def losing(*args: Any) -> Any:
        calls.append(1)
        for path in (tmp_path / "run" / "lock").glob("*.json") if len(calls) == call else ():
            path.unlink()
        return real(*args)

    monkeypatch.setattr(module, name, losing)
    assert exit_code(config) == 1
    (error,) = error_lines(capsys.readouterr().err)
    assert "is not this run's any more" in error
    assert not (tmp_path / "run" / "final").exists()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-??????"))
    assert names == [f"step-{step:06d}" for step in steps]
