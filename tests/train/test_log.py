"""RUN/log.txt: all that rank 0 says in the starts of a run."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dpo.config import Config
from dpo.distributed.world import World
from dpo.run_folder.holder import this_process
from dpo.run_folder.lock import take
from dpo.train import outputs, setup
from tests.support.runs import changed, exit_code, has_log_alone, logged, run, run_until, save_six_steps, six_steps


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_six_steps(tmp_path_factory.mktemp("log"))


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Config:
    return six_steps(root, tmp_path / "run")


def test_the_log_is_what_stderr_shows(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first line, before the folder is known, to the last."""
    assert exit_code(config) == 0
    shown = capsys.readouterr().err.splitlines()
    assert logged(tmp_path / "run") == shown
    assert shown[0].startswith("data: reading") and shown[-1].startswith("charts ")


def test_quiet_is_for_the_terminal_alone(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(config, "--quiet") == 0
    assert capsys.readouterr().err == ""
    steps = [line for line in logged(tmp_path / "run") if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/6", "6/6"]


def test_every_start_is_appended_with_the_error_that_ends_it(config: Config, tmp_path: Path) -> None:
    """Ends at step 2 with a loss that is not finite, and goes on with a step that is."""
    assert exit_code(changed(config, optim__lr=1e30)) == 1
    first = logged(tmp_path / "run")
    assert first[-1].startswith("error: step 2: the gradient is not finite: ")
    run(config)
    both = logged(tmp_path / "run")
    assert both[: len(first)] == first
    assert [line for line in both if line.startswith("done: ")] == [
        line for line in both[len(first) :] if "done:" in line
    ]


def test_two_runs_of_one_process_have_a_log_each(root: Path, tmp_path: Path) -> None:
    run(six_steps(root, tmp_path / "one"))
    first = logged(tmp_path / "one")
    run(six_steps(root, tmp_path / "two"))
    assert logged(tmp_path / "one") == first
    assert not any("one" in Path(line).parts for line in logged(tmp_path / "two"))
    assert sum(line.startswith("done: ") for line in logged(tmp_path / "two")) == 1


@pytest.mark.parametrize("target", ["train.setup.load_and_warm", "ref_logps.fill._run", "train.setup.make_optimizer"])
def test_a_failure_before_the_first_step_is_in_the_log(config: Config, tmp_path: Path, target: str) -> None:
    """Of the weights, of the reference pass, which may take hours, and of the optimizer. The lines from before it are
    there too, in a folder that has no other file.
    """
    fresh = changed(config, reference__cache_dir=str(tmp_path / "cache"))
    with patch(f"dpo.{target}", side_effect=MemoryError):
        assert exit_code(fresh) == 1
    lines = logged(tmp_path / "run")
    assert lines[0].startswith("data: reading") and lines[-1].startswith("error: rank 0: out of host memory: ")
    assert has_log_alone(tmp_path / "run")


def test_a_start_that_is_refused_writes_nothing(config: Config, tmp_path: Path) -> None:
    """Neither a folder nor, later, lines of it into the log of the next run of the process."""
    assert exit_code(changed(config, batch__pairs_per_step=9)) == 2
    assert not (tmp_path / "run").exists()
    run(config)
    assert not any("fewer than batch.pairs_per_step 9" in line for line in logged(tmp_path / "run"))


def test_a_log_alone_does_not_make_a_folder_used(config: Config, tmp_path: Path) -> None:
    """`never` wants a new folder: one in which a start failed before it made its own files is as good."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("2026-01-01 00:00:00  error: out of GPU memory\n")
    take(tmp_path / "run", replace(this_process({}), pid=2**22 + 1))  # of a start that was killed
    run(changed(config, checkpoint__resume="never"))
    assert logged(tmp_path / "run")[0] == "error: out of GPU memory"


def test_a_bug_leaves_its_traceback(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prints it on stderr; it keeps its lines in the log."""

    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(outputs, "open_run_folder", broken)
    with pytest.raises(KeyError):
        exit_code(config)
    lines = logged(tmp_path / "run")
    assert "Traceback (most recent call last):" in lines and lines[-1] == "KeyError: 'a bug'"


def test_of_several_ranks_the_first_writes(config: Config, tmp_path: Path) -> None:
    """What another rank says, a connection that it lost for instance, would stand among the lines of rank 0."""
    for rank in (1, 0):
        setup.write_log(config, World(rank, 2, rank, 2, torch.device("cpu")))
        assert (tmp_path / "run" / "log.txt").exists() == (rank == 0)


def test_a_run_that_resumes_tells_it(config: Config, tmp_path: Path) -> None:
    run_until(config, 5)
    run(config)
    assert f"resumes from {tmp_path}/run/checkpoints/step-000004" in logged(tmp_path / "run")
