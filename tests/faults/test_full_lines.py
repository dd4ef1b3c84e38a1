"""Every line of a full disk has the path, the bytes that were needed and those that are free, whoever was writing.

The runs are on a tmpfs that fills at another file each; nothing is checked before, as where another program fills the
disk meanwhile. A limit on the size of files (`ulimit -f`) and used up inodes are told likewise.
"""

import errno
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dpo.base.errors import UserError
from dpo.base.files import make_folder_atomically, naming, write_atomically, write_file
from dpo.base.space import describe_full
from dpo.board.event_files import open_events
from dpo.board.journal import Journal
from dpo.board.writer import MetricsWriter
from dpo.checkpoint import companions, marker, store
from dpo.checkpoint import export as exporting
from dpo.command.exits import line_of
from dpo.config import to_yaml
from dpo.disk import storage
from dpo.front.configs import copy_config, named_configs
from dpo.ref_logps import cache
from dpo.run_folder import evaluations, lock
from dpo.run_folder.holder import this_process
from dpo.sources.caching import one_error
from dpo.train import program
from dpo.train.profiling import profiled
from launch import here, reports
from tests.support.caches import cache_of_datasets
from tests.support.disks import small_disk
from tests.support.runs import exit_code, exit_code_of, save_six_steps, six_steps

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    # A file that took nothing fails once more when the collector closes it; a program has ended by then.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LINE = re.compile(
    r"(the disk is full|a file is too large): (rank 0 )?cannot write /\S+, "
    r"((about|more than|at least) )?[\d.,]+ (bytes?|[KM]iB)( in all)?: [\d.,]+ [KMGT]iB are free there"
)
"""Path, needed, free."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_six_steps(tmp_path_factory.mktemp("lines"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 2**20) as folder:
        yield folder


def leave(folder: Path, num_bytes: int) -> None:
    """Another program's file, which leaves so many bytes of the disk."""
    with (folder / "other").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - num_bytes)


@contextmanager
def limit(num_bytes: int) -> Iterator[None]:
    """`ulimit -f`; Python ignores the signal, so that a write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def unchecked() -> Iterator[None]:
    """No one looks for room before a write."""
    with ExitStack() as stack:
        for module in (storage, store, exporting, cache):
            stack.enter_context(patch.object(module, "find_shortage", lambda *_: None))
        yield


def lines_of_full(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if re.search("full|too large|No space|Errno|Traceback", line)]


# --- runs ------------------------------------------------------------------------------------------------------------

PAGE = 4096
RUN, CACHE, DATA = "run", "reference", "data"
LEVELS = [
    *((RUN, PAGE * count) for count in (0, 1, 2, 3, 4, 6, 8, 10, 12, 15)),
    *((CACHE, PAGE * count) for count in range(5)),
    *((DATA, PAGE * count) for count in (0, 1, 2, 3, 4, 6, 16)),
]
"""What lies on the disk, and the bytes that are left: each fills it at another file."""


@pytest.mark.parametrize(("which", "num_bytes"), LEVELS)
def test_a_run_tells_the_disk_that_fills(
    root: Path, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str, num_bytes: int
) -> None:
    leave(disk, num_bytes)
    run_dir, hf = (disk / "run", tmp_path / "hf") if which == RUN else (tmp_path / "run", tmp_path / "hf")
    changes = {"reference__cache_dir": str((disk if which == CACHE else tmp_path) / "cache"), "train__eval_every": 2}
    with unchecked(), cache_of_datasets(disk / "hf" if which == DATA else hf):
        code = exit_code(six_steps(root, run_dir, **changes))
    stderr = capsys.readouterr().err
    lines = lines_of_full(stderr)
    assert code in (1, 2) and "Traceback" not in stderr
    assert [line for line in lines if line.startswith("error: ")], stderr
    assert [line for line in lines if not LINE.search(line)] == []
    assert all(str(disk) in line for line in lines)


@pytest.mark.parametrize("num_bytes", [0, 1000, 4000, 6000, 20_000])
def test_a_run_tells_a_limit_on_the_size_of_files(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_bytes: int
) -> None:
    """The first file that is too large is one of the data's rows, tokens or pairs, of the board or a checkpoint."""
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(six_steps(root, tmp_path / "run", reference__cache_dir=str(tmp_path / "cache"))))
    with cache_of_datasets(tmp_path / "hf"), limit(num_bytes):
        code = exit_code_of(program.main, "dpo.train", "--config", str(file))
    stderr = capsys.readouterr().err
    lines = lines_of_full(stderr)
    assert code in (1, 2) and "Traceback" not in stderr
    assert [line for line in lines if not LINE.search(line) or "a file is too large" not in line] == []
    assert [line for line in lines if line.startswith("error: ") and "ulimit -f allows " in line]


# --- each writer -----------------------------------------------------------------------------------------------------


def metrics(folder: Path) -> None:
    with MetricsWriter(folder, []) as writer:
        writer.write(1, {"train/loss": 0.5})


def copied(folder: Path) -> None:
    source = folder.parent / "source"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(bytes(5000))
    companions._copy(source, ["tokenizer.json"], folder)


def trace(folder: Path) -> None:
    with profiled((1, 1), folder, torch.device("cpu")) as (begin, end):
        begin(1)
        torch.ones(1).add(1)
        end(1)


def data_set(folder: Path) -> None:
    with cache_of_datasets(folder), one_error("hub/set", "data.train[0]"):
        raise datasets.exceptions.DatasetGenerationError("generating") from OSError(errno.ENOSPC, "arrow's words")


def unnamed(text: str, kind: type[Exception]) -> Callable[[Path], None]:
    def fail(folder: Path) -> None:
        with naming(folder / "file", 1):
            raise kind(text)

    return fail


WRITERS: dict[str, Callable[[Path], object]] = {
    "an atomic file": lambda folder: write_atomically(folder / "file", b"abc"),
    "an atomic folder": lambda folder: make_folder_atomically(folder / "new", lambda at: write_file(at / "a", b"abc")),
    "an array": lambda folder: make_folder_atomically(
        folder / "new", lambda at: np.save(at / "a.npy", np.arange(10_000))
    ),
    "metrics": metrics,
    "events": lambda folder: open_events(folder, 1),
    "a tracker's journal": lambda folder: Journal(folder / "wandb.jsonl"),
    "evaluations": lambda folder: evaluations.write_evaluation(folder, 1, {"tokens": np.arange(3)}),
    "a lock": lambda folder: lock._write(folder / "lock", this_process({})),
    "a marker": lambda folder: marker.write_marker(folder, {}),
    "a copy": copied,
    "settings": lambda folder: companions._write(folder / "config.json", {}),
    "a trace": trace,
    "rows of a data set": data_set,
    "a shipped config": lambda folder: copy_config(min(named_configs()), folder / "my.yaml"),
    "work of the background": lambda folder: here.start_in_background(
        here.RunsHere((), (), folder), folder / "a.log", "python", ()
    ),
    "the history of a job": lambda folder: reports.add_to_history(folder / "run" / "jobs", reports.Outcome("done")),
    "numpy's short write": lambda folder: unnamed("1000 requested and 128 written", OSError)(folder),
    "SQLite": unnamed("database or disk is full", sqlite3.OperationalError),
    "xet": unnamed("Data processing error: No space left on device (os error 28)", RuntimeError),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_tells_path_needed_and_free(disk: Path, name: str) -> None:
    leave(disk, 0)
    try:
        WRITERS[name](disk)
        line = "no failure"
    except Exception as failure:  # each library has its own
        line = line_of(failure)
    assert LINE.fullmatch(line), line
    assert f"cannot write {disk}" in line


def test_a_model_that_safetensors_cannot_write(disk: Path) -> None:
    """Its error is no OSError, and has the system's number in its words alone."""
    leave(disk, 0)
    with pytest.raises(OSError, match="No space left on device") as raised, naming(disk / "model", 40_000):
        save_file({"weight": torch.zeros(10_000)}, disk / "model")
    assert line_of(raised.value) == f"the disk is full: cannot write {disk / 'model'}, 39.1 KiB: 0.0 KiB are free there"


def test_an_error_for_the_user_is_not_told_twice() -> None:
    assert describe_full(UserError("HF_HOME", "No space left on device")) is None


def test_inodes_that_are_used_up(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        done = subprocess.run(["mount", "-o", "remount,nr_inodes=1", str(disk)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(done.stderr)
        with pytest.raises(OSError, match="No space left on device") as raised:
            write_atomically(disk / "file", b"abc")
        told = f"the disk is full: cannot write {disk / 'file'}, 3 bytes: 1.0 MiB are free there, and no further "
        assert line_of(raised.value) == f"{told}file may be made: the inodes are used up"


def test_results_that_do_not_fit(disk: Path) -> None:
    """stdout is a file on the disk; its name is that of the descriptor."""
    leave(disk, 0)
    program = "from dpo.command.exits import run_program; import sys; sys.exit(run_program(lambda: print('x')))"
    with (disk / "results").open("wb") as out:
        done = subprocess.run([sys.executable, "-c", program], stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == (
        f"error: the disk is full: cannot write {disk / 'results'}, at least 1 byte: 0.0 KiB are free there"
    )


def test_the_write_that_failed_is_told_and_not_the_close(disk: Path) -> None:
    """A file keeps a line that did not fit, and fails once more when it is closed."""
    leave(disk, 0)
    with pytest.raises(OSError, match="No space left on device") as raised:
        metrics(disk)
    size = len('{"step": 1, "train/loss": 0.5}\n')
    told = f"cannot write {disk / 'metrics.jsonl'}, {size} bytes: 0.0 KiB are free there"
    assert line_of(raised.value) == f"the disk is full: {told}"
