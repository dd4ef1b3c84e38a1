"""What becomes of a job when the torchruns of its nodes have ended; pure, the table of `launch.node` in code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.failures import Failure, describe, first_cause
from launch.reports import Outcome

STOPPED = Outcome("stopped", "ended by SIGTERM (scancel, a requeue, a lost node)", 143)


@dataclass(frozen=True)
class End:
    """How a job ended this time, as its first node knows it."""

    exit_code: int
    """Of the first node's torchrun."""
    asked_to_stop: bool
    """SIGUSR2 or SIGTERM came."""
    was_ended: bool
    """SIGTERM came, and the job is not meant to go on."""
    status: Mapping[str, Any]
    """What rank 0 wrote (`dpo.base.status.write_status`); empty: nothing."""
    failures: Sequence[Failure] = ()
    """Of all nodes."""
    crashes_before: int = 0
    """How often a crash has restarted the job since it made progress."""


def decide(end: End, max_crashes: int) -> Outcome:
    """The outcome; `preempted` and `crashed` mean that the job starts again."""
    if end.exit_code == 0 and _state(end) == "done":
        return _done(end)
    if end.was_ended:
        return STOPPED
    if end.exit_code == 0:
        return _preempted(end)
    cause = first_cause(end.failures)
    if cause and cause.is_exception:
        return Outcome("failed", str(cause), cause.exit_code, cause.traceback)
    if end.asked_to_stop:
        return _preempted(end)
    why = describe(end.failures)
    if end.crashes_before < max_crashes:
        return Outcome("crashed", f"{why}; crash {end.crashes_before + 1} of {max_crashes} that restart the job", 1)
    return Outcome("failed", f"{why}; --max-crashes {max_crashes} is used up", 1)


def _state(end: End) -> str:
    """What rank 0 wrote: it tells a run that is done from one that stopped to go on."""
    return str(end.status.get("state", "preempted" if end.asked_to_stop else "done"))


def _done(end: End) -> Outcome:
    return Outcome("done", f"step {end.status['step']}" if "step" in end.status else "")


def _preempted(end: End) -> Outcome:
    if end.status.get("state") == "preempted":
        return Outcome("preempted", f"saved at step {end.status['step']}" if "step" in end.status else "saved")
    return Outcome("preempted", "the ranks did not end in time (--signal-delay); goes on from the checkpoint before", 1)
