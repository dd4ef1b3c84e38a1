"""The exit code and the last line of a command that started ranks: pure functions of how they ended.

| the ranks ended because                              | exit code                 |
|------------------------------------------------------|---------------------------|
| they are done                                        | 0                         |
| the user's input is wrong / a failure while running  | 2 / 1                     |
| a signal asked them to save, and they have           | 0; 130 after Ctrl-C       |
| a signal came before the first step, or a second one | 128 + signal: 130, 143    |
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo.base.blame import Failure, first_cause
from dpo.front.names import Command


@dataclass(frozen=True)
class End:
    """How the ranks ended, as their parent knows it."""

    stops: tuple[int, ...] = ()
    """The signals that the parent received, in order."""
    first_step: int | None = None
    """The first step of this start; None where the steps had not begun when the ranks were asked to stop, or ended."""
    status: Mapping[str, Any] | None = None
    """The last status that rank 0 wrote; None: it wrote none."""
    failures: Sequence[Failure] = ()
    killed: bool = False
    """The parent killed the ranks: a second signal, or one before the first step."""

    @property
    def saved_step(self) -> int | None:
        """Returns the step that this start saved when it was asked to stop; None where it saved none."""
        status = self.status or {}
        if self.killed or self.first_step is None or status.get("state") != "preempted":
            return None
        return int(status["step"]) if status["step"] >= self.first_step else None

    @property
    def is_stopped(self) -> bool:
        """Returns whether a signal ended the run."""
        return self.killed or (bool(self.stops) and (self.status or {}).get("state") == "preempted")


def exit_code(end: End) -> int:
    """Returns the exit code of the command."""
    if end.failures and not end.killed:
        cause = first_cause(end.failures)
        return cause.exit_code if cause and not cause.killed_by else 1
    if not end.is_stopped:
        return 0
    first = end.stops[0]
    return 0 if end.saved_step is not None and first != signal.SIGINT else 128 + first


def stop_advice(end: End, command: Command) -> str:
    """Returns what a stopped run has kept, and how to go on."""
    if end.saved_step is not None:
        return f"step {end.saved_step} is saved: the same command goes on from there"
    if end.first_step is not None and end.killed:
        return f"the ranks were ended before they had saved: {command.after_stop}"
    return command.before_steps + command.after_stop


def untold_cause(failures: Sequence[Failure]) -> str | None:
    """Returns the error line of the failure to blame; None where it is the only line that the ranks have printed."""
    cause = first_cause(failures)
    if cause is None or {failure.told for failure in failures if failure.told} == {cause.told}:
        return None
    return cause.told or str(cause)
