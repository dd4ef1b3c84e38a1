"""Training from Python, in the caller's process:

    from dpo import load_config, run_training

    config = load_config("my.yaml", {"loss.beta": 0.5})
    model_folder = run_training(config)

A process may train several runs, one after another. Under torchrun every rank makes the same calls.
"""

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dpo.config
from dpo.base.errors import UserError
from dpo.command.line import COMMAND_LINE
from dpo.config import Config
from dpo.run_folder.files import FINAL


def load_config(config: str | Path | Sequence[str], changes: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks a config.

    Args:
        config: the path of a YAML file; or the words of a command line, such as `["--config", "my.yaml"]`.
        changes: keys of the config, SECTION.KEY, with their values; they replace those of the file.

    Raises:
        UserError: a ValueError with one line: the place, the problem, and the valid values.
    """
    words = ["--config", str(config)] if isinstance(config, (str, Path)) else list(config)
    words += [f"--{key}={_text(value)}" for key, value in (changes or {}).items()]
    try:
        return dpo.config.load_config(words, prog="dpo.train")
    except UserError as failure:
        place = failure.place.removeprefix(f"{COMMAND_LINE}: ")
        raise failure.at(place) from failure


def _text(value: Any) -> str:
    """Returns a value as a command line gives it: texts as they are, others as YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def run_training(config: Config) -> Path:
    """Trains a model as `python -m dpo.train` does, and returns the folder of the model.

    While it runs in the main thread, SIGUSR2 asks it to save and end. In another thread no signal does, since Python
    sets handlers in the main thread alone.

    Raises:
        UserError: the input is wrong; found before the first step.
        RunError: a failure while running, such as a gradient that is not finite.
        Preempted: SIGUSR2 ended the run, which has saved the steps that it made; the same call goes on.
    """
    from dpo.train import program  # imports torch

    with _as_before():
        program.run_training(config)
    return Path(str(config.train.run_dir), FINAL)


@contextmanager
def _as_before() -> Iterator[None]:
    """Restores after the block what a training changes in its process: the handler of SIGUSR2, and the process group of
    a single rank, which stays after a failure.
    """
    import torch.distributed as dist

    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGUSR2)
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGUSR2, handler)
        if dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()
