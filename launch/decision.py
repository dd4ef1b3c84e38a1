"""Decides whether a job is done, has failed or starts again: the table of `launch.node` as a pure function."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo.base.workers import signal_name
from dpo.command.blame import Failure, first_cause
from launch.failures import describe
from launch.reports import Outcome

_SENDERS: Mapping[int, str] = {signal.SIGTERM: " (scancel, a requeue, a lost node, kill)", signal.SIGINT: " (Ctrl-C)"}


@dataclass(frozen=True)
class End:
    """How one start of a job ended, as the first node knows it."""

    exit_code: int
    """Exit code of the first node's torchrun."""
    asked_to_stop: bool
    """A signal was received that asks the ranks to save."""
    ended_by: int
    """The signal after which the job must not start again; 0: none."""
    status: Mapping[str, Any]
    """The status that rank 0 wrote (`dpo.command.status.write_status`); empty: none."""
    failures: Sequence[Failure] = ()
    """The failures on all nodes."""
    crashes_before: int = 0
    """Number of restarts after a crash since the newest checkpoint."""
    early: str = "before the first step"
    """Where the program was if it has told no step, for the user."""


def decide(end: End, max_crashes: int) -> Outcome:
    """Returns the outcome of a job. It starts again after `preempted` and `crashed`.

    Args:
        end: how this start of the job ended.
        max_crashes: maximum number of restarts after crashes without a new checkpoint in between.
    """
    cause = first_cause(end.failures)
    has_raised = cause is not None and cause.is_exception
    if _is_done(end, has_raised):
        return Outcome("done")
    if end.ended_by:
        return stopped(end.ended_by, _kept(end, cause if has_raised else None))
    if end.exit_code == 0:
        return _preempted(end)
    if cause and has_raised:
        return Outcome("failed", str(cause), cause.exit_code, cause.traceback)
    if end.asked_to_stop:
        return _preempted(end)
    why = describe(end.failures)
    if end.crashes_before < max_crashes:
        return Outcome("crashed", f"{why}; crash {end.crashes_before + 1} of {max_crashes} that restart the job", 1)
    return Outcome("failed", f"{why}; --max-crashes {max_crashes} is used up", 1)


def _is_done(end: End, has_raised: bool) -> bool:
    """Returns whether nothing is left to do: also where a signal ended ranks that only waited for a tracker, and where
    the ranks ended by themselves without a word on their end, since the disk was full or the program writes none.
    """
    state = end.status.get("state")
    was_signalled = end.asked_to_stop or end.ended_by != 0
    if state == "done":
        return end.exit_code == 0 or (was_signalled and not has_raised)
    return end.exit_code == 0 and state != "preempted" and not was_signalled


def stopped(number: int, kept: str) -> Outcome:
    """Returns the outcome of a job that a signal has ended, and that does not start itself again; a requeueing is
    SLURM's.

    Args:
        number: the signal.
        kept: what the run has kept; empty: not known.
    """
    how = f"ended by {signal_name(number)}{_SENDERS.get(number, '')}"
    return Outcome("stopped", f"{kept}; {how}" if kept else how, 128 + number)


def _kept(end: End, cause: Failure | None) -> str:
    """Returns what a job that is ended has saved, or why not."""
    state = end.status.get("state")
    if state == "preempted":
        return _saved(end)
    if state == "training":
        return f"not saved: {cause}" if cause else "not saved in time; resumes from the last checkpoint"
    return end.early


def _saved(end: End) -> str:
    step = end.status["step"]
    unsaved = f"before its first step; resumes from step {step}" if step else f"{end.early}; starts again"
    return f"saved at step {step}" if end.status["saved"] else unsaved


def _preempted(end: End) -> Outcome:
    if end.status.get("state") == "preempted":
        return Outcome("preempted", _saved(end))
    return Outcome("preempted", "the ranks did not exit in time (--signal-delay); resumes from the last checkpoint", 1)
