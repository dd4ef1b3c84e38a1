"""Trainings whose tracker fails, or never ends: the model is exported, and its page is written."""

from pathlib import Path

import pytest

from dpo.board import sinks
from dpo.board.sink import Ending
from dpo.config import Config
from tests.board.test_trackers import Library, Service, steps_of
from tests.support.runs import run, save_six_steps, six_steps


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return six_steps(save_six_steps(tmp_path), tmp_path / "run", train__report_to=["tensorboard", "wandb"])


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """The service to which runs send what they report to `wandb`."""
    service = Service()
    monkeypatch.setattr(sinks, "check_installed", lambda names: None)
    monkeypatch.setattr("dpo.train.start.check_installed", lambda names: None)
    monkeypatch.setitem(sinks.OPENERS, "wandb", sinks._open_tracker("wandb", service.connect))  # type: ignore[arg-type]
    return service


def assert_is_whole(run_dir: Path) -> None:
    assert (run_dir / "final" / "model.safetensors").is_file() and (run_dir / "report.html").is_file()
    assert (run_dir / "checkpoints" / "step-000006").is_dir()


def test_a_tracker_that_fails_costs_one_warning(
    config: Config, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.fails_at = 4
    run_dir = run(config)
    assert_is_whole(run_dir)
    assert steps_of(service, "train/loss") == [1, 2, 3]
    assert capsys.readouterr().err.count("WARNING: wandb failed") == 1


def test_the_model_is_exported_before_a_tracker_is_waited_for(
    config: Config, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library waits for the network without an end, and the process is killed there."""

    class Killed(BaseException):
        pass

    def wait_until_killed(library: Library, ending: Ending) -> None:
        raise Killed

    monkeypatch.setattr(Library, "close", wait_until_killed)
    with pytest.raises(Killed):
        run(config)
    assert_is_whole(Path(str(config.train.run_dir)))
