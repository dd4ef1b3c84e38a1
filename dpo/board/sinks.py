"""Opens the sinks that `train.report_to` names."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from dpo import DISTRIBUTION
from dpo.base.errors import UserError
from dpo.board.sink import Sink
from dpo.board.tracker import Client, Opening, Tracker
from dpo.config import Config

Lines = Sequence[Mapping[str, float]]
"""Lines of metrics.jsonl."""


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for a sink whose package, of the same name, is not installed."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # without an origin: a folder, such as W&B makes where it runs
            valid = f"after pip install '{DISTRIBUTION}[{name}]', or a list without {name}"
            raise UserError("train.report_to", f"{name} is not installed", valid)


def open_sinks(config: Config, first_step: int, earlier: Lines) -> list[Sink]:
    """Opens the sinks of a run, for rank 0 alone.

    Args:
        config: names the sinks and the run folder.
        first_step: the first step of this start.
        earlier: the lines of metrics.jsonl before that step.
    """
    return [OPENERS[name](config, first_step, earlier) for name in config.train.report_to]


def _open_dashboard(config: Config, first_step: int, earlier: Lines) -> Sink:
    from dpo.board.dashboard import Dashboard  # only here, because only rank 0 needs tensorboard, a quarter second

    return Dashboard(Path(str(config.train.run_dir)) / "tensorboard", first_step, earlier)


def _open_tracker(name: str, connect: Callable[[Opening], Client]) -> Callable[[Config, int, Lines], Sink]:
    """Returns a function that opens a tracker, and sends the lines of earlier starts that it was not sent."""

    def open_it(config: Config, first_step: int, earlier: Lines) -> Sink:
        tracker = Tracker(name, config, first_step, connect)
        for line in earlier:
            tracker.metrics(int(line["step"]), {name: metric for name, metric in line.items() if name != "step"})
        return tracker

    return open_it


def _connect_wandb(opening: Opening) -> Client:
    from dpo.board.to_wandb import WandbRun  # only here, because the package is an extra

    return WandbRun(opening)


def _connect_trackio(opening: Opening) -> Client:
    from dpo.board.to_trackio import TrackioRun  # only here, because the package is an extra

    return TrackioRun(opening)


OPENERS: Mapping[str, Callable[[Config, int, Lines], Sink]] = {
    "tensorboard": _open_dashboard,
    "wandb": _open_tracker("wandb", _connect_wandb),
    "trackio": _open_tracker("trackio", _connect_trackio),
}
"""Name in `train.report_to` -> function of the config, the first step of this start, and the lines before it."""
