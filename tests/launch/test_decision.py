"""Who is to blame, and what becomes of a job: the table of `launch.node`, row by row."""

import signal
from dataclasses import replace
from typing import Any

import pytest

from dpo.command.blame import Failure, first_cause
from launch.decision import End, decide

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [10.77.0.2]:54470: Connection reset by peer"
TIMED_OUT = "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"
RESET = "ConnectionResetError: [Errno 104] Connection reset by peer"


def raised(rank: int, time: float, message: str = "ValueError: boom") -> Failure:
    """A rank that raised."""
    return Failure(f"node{rank}", rank, time, message, traceback="Traceback ...\n")


def killed(rank: int, time: float, number: int = signal.SIGKILL) -> Failure:
    """A rank that a signal ended."""
    return Failure(f"node{rank}", rank, time, f"killed by {signal.Signals(number).name}", killed_by=number)


@pytest.mark.parametrize(
    ("failures", "to_blame"),
    [
        ([raised(0, 5.0), raised(1, 4.0)], 1),
        ([raised(0, 3.0, LOST), raised(1, 4.0)], 1),
        ([raised(0, 3.0, TIMED_OUT), raised(1, 4.0)], 1),
        ([raised(0, 3.0, RESET), raised(1, 4.0)], 1),
        ([raised(0, 3.0, LOST), killed(1, 4.0)], 1),
        ([killed(0, 3.0, signal.SIGTERM), raised(1, 4.0)], 1),
        ([killed(0, 3.0, signal.SIGTERM), raised(1, 4.0, LOST)], 1),
        ([killed(0, 3.0, signal.SIGABRT), killed(1, 4.0, signal.SIGSEGV)], 1),
        ([raised(0, 3.0, "DistBackendError: NCCL communicator was aborted"), killed(1, 4.0, signal.SIGABRT)], 1),
        ([raised(0, 3.0, LOST), raised(1, 2.0, LOST)], 1),
        ([raised(0, 3.0, "SignalException: Process 7 got signal: 15"), raised(1, 4.0)], 1),
    ],
    ids=[
        "the earlier",
        "not who lost it",
        "not who waited in vain",
        "not who lost the store",
        "killed, not who lost it",
        "not whom torchrun ended",
        "nor before who lost it",
        "NCCL's abort",
        "an abort before a lost peer",
        "the earlier of those who lost it",
        "not torchrun that was ended",
    ],
)
def test_who_was_first(failures: list[Failure], to_blame: int) -> None:
    found = first_cause(failures)
    assert found is not None and found.rank == to_blame


DONE, SAVED = {"state": "done"}, {"state": "preempted", "step": 4, "saved": True}
UNSAVED, TRAINING = SAVED | {"saved": False}, {"state": "training", "step": 1}
USERS = Failure("node0", 0, 1.0, "UserError: a.yaml: bad", user_line="a.yaml: bad", exit_code=2)
BY_RANK_1 = "rank 1 on node1: ValueError: boom"


@pytest.mark.parametrize(
    ("facts", "state", "message", "exit_code"),
    [
        ({"status": DONE}, "done", "", 0),
        ({"status": DONE, "asked_to_stop": True}, "done", "", 0),
        ({"status": DONE, "ended_by": signal.SIGTERM}, "done", "", 0),
        ({}, "done", "", 0),
        ({"status": SAVED, "asked_to_stop": True}, "preempted", "saved at step 4", 0),
        ({"status": SAVED}, "preempted", "saved at step 4", 0),
        ({"status": UNSAVED}, "preempted", "before its first step; resumes from step 4", 0),
        ({"status": UNSAVED | {"step": 0}}, "preempted", "before the first step; starts again", 0),
        (
            {"exit_code": 1, "asked_to_stop": True, "failures": [killed(0, 1.0, signal.SIGTERM)]},
            "preempted",
            "in time",
            1,
        ),
        ({"exit_code": 1, "asked_to_stop": True, "status": SAVED}, "preempted", "saved at step 4", 0),
        ({"exit_code": 1, "asked_to_stop": True, "failures": [raised(1, 1.0)]}, "failed", BY_RANK_1, 1),
        ({"exit_code": 1, "failures": [raised(1, 1.0), killed(0, 2.0, signal.SIGTERM)]}, "failed", BY_RANK_1, 1),
        ({"exit_code": 1, "failures": [USERS]}, "failed", "a.yaml: bad", 2),
        ({"exit_code": 1, "failures": [killed(1, 1.0)]}, "crashed", "killed by SIGKILL; crash 1 of 2 that restart", 1),
        (
            {"exit_code": 1, "failures": [killed(1, 1.0)], "crashes_before": 1},
            "crashed",
            "crash 2 of 2 that restart",
            1,
        ),
        (
            {"exit_code": 1, "failures": [killed(1, 1.0)], "crashes_before": 2},
            "failed",
            "--max-crashes 2 is used up",
            1,
        ),
        ({"exit_code": 1, "failures": [raised(0, 1.0, LOST)]}, "crashed", "Connection reset by peer", 1),
        # after all is saved, while a tracker is waited for
        ({"exit_code": -15, "status": DONE, "asked_to_stop": True}, "done", "", 0),
        ({"exit_code": -15, "status": DONE, "ended_by": signal.SIGTERM, "failures": [killed(0, 1.0)]}, "done", "", 0),
        ({"exit_code": 1, "status": DONE, "asked_to_stop": True, "failures": [raised(1, 1.0)]}, "failed", BY_RANK_1, 1),
        ({"exit_code": 1, "status": DONE, "failures": [killed(1, 1.0)]}, "crashed", "killed by SIGKILL", 1),
        # the end could not be written
        ({"status": TRAINING, "ended_by": signal.SIGTERM}, "stopped", "SIGTERM", 143),
        ({"status": TRAINING}, "done", "", 0),
        ({"status": TRAINING, "asked_to_stop": True}, "preempted", "resumes from the last checkpoint", 1),
        ({"exit_code": 1, "failures": []}, "crashed", "none of its ranks reported why", 1),
        ({"exit_code": 1, "ended_by": signal.SIGTERM, "failures": [raised(0, 1.0)]}, "stopped", "SIGTERM", 143),
        (
            {"ended_by": signal.SIGTERM, "asked_to_stop": True, "status": SAVED},
            "stopped",
            "saved at step 4; ended by SIGTERM (scancel, a requeue, a lost node, kill)",
            143,
        ),
        ({"ended_by": signal.SIGINT, "status": SAVED}, "stopped", "saved at step 4; ended by SIGINT (Ctrl-C)", 130),
        ({"ended_by": signal.SIGHUP, "status": SAVED}, "stopped", "saved at step 4; ended by SIGHUP", 129),
        ({"ended_by": signal.SIGINT, "status": UNSAVED}, "stopped", "before its first step; resumes from step 4", 130),
        ({"ended_by": signal.SIGINT, "exit_code": -15}, "stopped", "before the first step; ended by SIGINT", 130),
        (
            {"exit_code": 1, "status": TRAINING, "ended_by": signal.SIGTERM, "failures": [raised(1, 1.0)]},
            "stopped",
            f"not saved: {BY_RANK_1}; ended by SIGTERM",
            143,
        ),
        (
            {"exit_code": 1, "status": TRAINING, "ended_by": signal.SIGTERM, "failures": [killed(1, 1.0)]},
            "stopped",
            "not saved in time; resumes from the last checkpoint; ended by SIGTERM",
            143,
        ),
    ],
)
def test_what_becomes_of_the_job(facts: dict[str, Any], state: str, message: str, exit_code: int) -> None:
    end = End(**({"exit_code": 0, "asked_to_stop": False, "ended_by": 0, "status": {}} | facts))
    outcome = decide(end, max_crashes=2)
    assert (outcome.state, outcome.exit_code) == (state, exit_code)
    assert message in outcome.message


def test_what_the_user_is_told() -> None:
    """What was written for the user is shown as it is; of a bug the traceback too."""
    what = "step 3: the gradient norm is nan"
    told = End(1, False, 0, {}, [replace(raised(0, 1.0, f"RunError: {what}"), user_line=what)])
    assert decide(told, 2).message == f"rank 0 on node0: {what}"
    assert decide(End(1, False, 0, {}, [raised(0, 1.0)]), 2).traceback == "Traceback ...\n"


@pytest.mark.parametrize(
    "message",
    [
        "AcceleratorError: CUDA error: uncorrectable ECC error encountered",
        "RuntimeError: GPU 3 has fallen off the bus",
        "OSError: [Errno 116] Stale file handle: 'runs/my/metrics.jsonl'",
    ],
)
def test_a_broken_machine_is_no_bug(message: str) -> None:
    """Another one may do."""
    assert decide(End(1, False, 0, {}, [raised(0, 1.0, message)]), 2).state == "crashed"
