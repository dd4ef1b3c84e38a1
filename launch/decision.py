"""What becomes of a job when the torchruns of its nodes have ended; pure, the table of `launch.node` in code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.failures import Failure, describe, first_cause
from launch.reports import Outcome


@dataclass(frozen=True)
class End:
    """How a job ended this time, as its first node knows it."""

    exit_code: int
    """Of the first node's torchrun."""
    asked_to_stop: bool
    """SIGUSR2 came."""
    was_ended: bool
    """SIGTERM came."""
    status: Mapping[str, Any]
    """What rank 0 wrote (`dpo.run_files.write_status`); empty: nothing."""
    failures: Sequence[Failure] = ()
    """Of all nodes."""
    crashes_before: int = 0
    """How often a crash has restarted the job already."""


def decide(end: End, max_crashes: int) -> Outcome:
    """The outcome; `preempted` and `crashed` mean that the job starts again."""
    if end.exit_code == 0:
        return _good(end)
    if end.was_ended:
        return Outcome("stopped", "SIGTERM: cancelled, or requeued by hand", 143)
    cause = first_cause(end.failures)
    if cause and cause.is_exception:
        return Outcome("failed", str(cause), 2 if cause.is_users else 1, "" if cause.is_told else cause.traceback)
    if end.asked_to_stop:
        return Outcome("preempted", "the ranks did not save in time (--signal-delay); the checkpoint before counts", 1)
    why = describe(end.failures)
    if end.crashes_before < max_crashes:
        return Outcome("crashed", f"{why}; restart {end.crashes_before + 1} of at most {max_crashes}", 1)
    return Outcome("failed", f"{why}; restarted {end.crashes_before} times already (--max-crashes)", 1)


def _good(end: End) -> Outcome:
    """Where torchrun's exit code is 0: what rank 0 wrote tells a run that is done from one that stopped to go on."""
    state = end.status.get("state", "preempted" if end.asked_to_stop else "done")
    step = f"step {end.status['step']}" if "step" in end.status else "an unknown step"
    if state == "preempted":
        return Outcome("preempted", f"saved at {step}")
    return Outcome("done", f"at {step}" if "step" in end.status else "")
