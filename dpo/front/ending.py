"""The exit code and the last line of a command that started ranks: pure functions of how they ended.

The first row that applies decides:

| the ranks ended because                                       | exit code           | last line, if any              |
|---------------------------------------------------------------|---------------------|--------------------------------|
| a rank failed: the user's input is wrong / while running      | 2 / 1               | the error, unless a rank has   |
| they were asked to save, and have                             | 0; 130 after Ctrl-C | the step that is saved         |
| they are done; a signal may have come after the last step     | 0; 130 after Ctrl-C | after a signal: complete       |
| they ended well after a signal, and could not say how         | 0; 130 after Ctrl-C | how to go on                   |
| a second signal came after the first step, and killed them    | 128 + signal        | they had not saved             |
| a signal came before the first step, and ended them           | 128 + signal        | nothing is saved               |

128 + signal is 130 for SIGINT (Ctrl-C), 143 for SIGTERM, 129 for SIGHUP (a closed terminal), 140 for SIGUSR2.
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo.command.blame import Failure, first_cause
from dpo.front.names import Command


@dataclass(frozen=True)
class End:
    """How the ranks ended, as their parent knows it."""

    stops: tuple[int, ...] = ()
    """The signals that the parent received, in order."""
    status: Mapping[str, Any] = field(default_factory=dict)
    """The last status that rank 0 wrote (`dpo.command.status`), read once all ranks had ended; empty: none."""
    failures: Sequence[Failure] = ()
    """Of ranks that ended by themselves."""
    is_killed: bool = False
    """Whether the parent killed the ranks: a second signal, or one before the first step."""


@dataclass(frozen=True)
class Verdict:
    """How the command ends. At most one of the two lines is there."""

    exit_code: int
    error: str | None = None
    """The line of the error; None: there is none."""
    is_printed: bool = False
    """Whether the ranks have printed this line, and no other line of an error."""
    is_logged: bool = False
    """Whether rank 0 has printed this line, and so has it in its log."""
    stop: str | None = None
    """What a stopped run has kept, and how to go on."""


def is_time_to_kill(num_stops: int, status: Mapping[str, Any]) -> bool:
    """Returns whether the parent kills its ranks: nothing can be saved before the first step, and a second signal is
    not to wait. A run that is saved or done after one signal ends by itself.
    """
    return num_stops > 1 or (num_stops == 1 and not status)


def judge(end: End, command: Command) -> Verdict:
    """Returns the exit code and the last line."""
    state = end.status.get("state")
    if end.failures:
        return _blamed(end.failures, command)
    if state == "preempted" and end.status["saved"]:
        return Verdict(_ended(end), stop=f"step {end.status['step']} is saved: the same command goes on from there")
    if state == "done" or not (end.is_killed or state in ("preempted", "training")):
        return Verdict(_ended(end), stop="the run is complete" if end.stops else None)
    if state == "training" and not end.is_killed:
        return Verdict(_ended(end), stop=command.after_stop if end.stops else None)
    if state == "training":
        stop = f"the ranks were ended before they had saved: {command.after_stop}"
        return Verdict(_cut_short(end), stop=stop)
    return Verdict(_cut_short(end), stop=command.before_steps + command.after_stop)


def _blamed(failures: Sequence[Failure], command: Command) -> Verdict:
    cause = first_cause(failures)
    assert cause is not None, "there are failures"
    line = cause.told or str(cause)
    if cause.killed_by:
        memory = "; often by the kernel, where host memory runs out" if cause.killed_by == signal.SIGKILL else ""
        line += f"{memory}; {command.after_stop}" if command.after_stop else memory
    return Verdict(
        exit_code=1 if cause.killed_by else cause.exit_code,
        error=line,
        is_printed={failure.told for failure in failures if failure.told} == {line},
        is_logged=any(failure.rank == 0 and failure.told == line for failure in failures),
    )


def _ended(end: End) -> int:
    """Returns 0, and 130 after Ctrl-C: a shell that runs one command after the other must not go on to the next."""
    return _cut_short(end) if signal.SIGINT in end.stops[:1] else 0


def _cut_short(end: End) -> int:
    """Returns 128 + the first signal; without one the ranks got SIGUSR2 themselves."""
    return 128 + (end.stops[0] if end.stops else signal.SIGUSR2)
