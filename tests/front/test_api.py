"""Training from Python: `from dpo import load_config, run_training`, several times in one process."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo import load_config, run_training
from dpo.base.errors import UserError
from dpo.config import to_yaml
from tests.support.runs import run, same_weights, save_six_steps, six_steps, train_lines, without_clock


def test_importing_the_package_loads_no_torch() -> None:
    """Nor do its two names, until a run begins."""
    code = "import sys, dpo\nfrom dpo import load_config, run_training\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(ImportError):
        from dpo import nothing  # type: ignore[attr-defined]  # noqa: F401


def test_changes_are_of_the_type_of_their_key(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model: {path: m}\ndata: {train: [{path: a.jsonl}]}\n")
    changes = {
        "loss.beta": 0.5,
        "optim.lr": 1e-7,
        "loss.name": "ipo",
        "train.eval_every": None,
        "data.train": [{"path": "b.jsonl", "holdout": 10}],
    }
    config = load_config(tmp_path / "my.yaml", changes)
    assert (config.loss.beta, config.optim.lr, config.loss.name, config.train.eval_every) == (0.5, 1e-7, "ipo", None)
    assert [(source.path, source.holdout) for source in config.data.train] == [("b.jsonl", 10)]
    assert load_config(["--config", str(tmp_path / "my.yaml"), "--loss.beta", "0.5"]).loss.beta == 0.5
    with pytest.raises(ValueError, match=r"^loss\.beto: unknown key; did you mean loss\.beta\?"):
        load_config(str(tmp_path / "my.yaml"), {"loss.beto": 0.5})


@pytest.fixture
def own_handler() -> Iterator[Callable[..., None]]:
    """A handler of SIGUSR2 that the caller of `run_training` has set."""

    def handle(number: int, frame: object) -> None:
        pass

    before = signal.signal(signal.SIGUSR2, handle)
    yield handle
    signal.signal(signal.SIGUSR2, before)


def test_several_runs_in_one_process(tmp_path: Path, own_handler: Callable[..., None]) -> None:
    """One that fails, one, the same elsewhere, and one in another thread: each equals the run of the program, and the
    handlers of signals stay as they were.
    """
    root = save_six_steps(tmp_path)
    (tmp_path / "my.yaml").write_text(to_yaml(six_steps(root, tmp_path / "first")))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        run_training(load_config(tmp_path / "my.yaml", {"data.train": [{"path": "missing.jsonl"}]}))
    assert run_training(load_config(tmp_path / "my.yaml")) == tmp_path / "first" / "final"
    run_training(load_config(tmp_path / "my.yaml", {"train.run_dir": str(tmp_path / "second")}))
    config = load_config(tmp_path / "my.yaml", {"train.run_dir": str(tmp_path / "thread")})
    thread = threading.Thread(target=run_training, args=(config,))
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert signal.getsignal(signal.SIGUSR2) is own_handler
    by_program = run(six_steps(root, tmp_path / "program"))
    for name in ("first", "second", "thread"):
        assert same_weights(tmp_path / name / "final", by_program / "final")
        assert without_clock(train_lines(tmp_path / name)) == without_clock(train_lines(by_program))
