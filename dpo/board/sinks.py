"""Opens the sinks that `train.report_to` names."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

from dpo.base.errors import UserError
from dpo.board.dashboard import Dashboard
from dpo.board.sink import Sink
from dpo.config import Config

Lines = Sequence[Mapping[str, float]]
"""Lines of metrics.jsonl."""

OPENERS: Mapping[str, Callable[[Path, int, Lines], Sink]] = {
    "tensorboard": lambda run_dir, first_step, earlier: Dashboard(run_dir / "tensorboard", first_step, earlier),
}
"""Name in `train.report_to` -> function of the run folder, the first step of this start, and the lines before it."""


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for a sink whose package, of the same name, is not installed."""
    for name in names:
        if find_spec(name) is None:
            distribution = packages_distributions().get("dpo", ["dpo"])[0]
            valid = f"after pip install '{distribution}[{name}]', or a list without {name}"
            raise UserError("train.report_to", f"{name} is not installed", valid)


def open_sinks(config: Config, first_step: int, earlier: Lines) -> list[Sink]:
    """Opens the sinks of a run, for rank 0 alone.

    Args:
        config: names the sinks and the run folder.
        first_step: the first step of this start.
        earlier: the lines of metrics.jsonl before that step.
    """
    return [OPENERS[name](Path(str(config.train.run_dir)), first_step, earlier) for name in config.train.report_to]
