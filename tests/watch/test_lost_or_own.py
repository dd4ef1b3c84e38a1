"""NCCL raises one exception for a lost rank and for a rank's own GPU: the message tells which."""

from pathlib import Path

import pytest
from torch.distributed import DistBackendError

from dpo.command.blame import Failure, first_cause, read_error
from dpo.watch.failures import NotConnected, has_lost_rank, met_alone, name_lost, record_failure

HEAD = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
SYSTEM = (
    HEAD + "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System"
    " call (e.g. socket, malloc) or external library call failed or device error. It can be also caused by unexpected"
    " exit of a remote peer, you can check NCCL warnings for failure reason and see if there is a connection failure"
    " message.\nLast error:\n"
)
CUDA = (
    HEAD + "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError:"
    " Call to CUDA function failed.\nLast error:\n"
)
OWN = [
    CUDA + "Cuda failure 214 'uncorrectable ECC error encountered'",
    CUDA + "Cuda failure 702 'the launch timed out and was terminated'",
    CUDA + "Cuda failure 2 'out of memory'",
    SYSTEM + "Error: failed to extend /dev/shm/nccl-x to 33030532 bytes, error: No space left on device (28)",
]
LOST = [
    "NCCL communicator was aborted on rank 0.",
    HEAD + "remote process exited or there was a network error, NCCL version 2.27.5\nncclRemoteError: A call failed"
    " possibly due to a network error or a remote process exiting prematurely.\nLast error:\n",
    SYSTEM + "socketStartConnect: Connect to 10.0.0.2<1> failed : Connection refused",
    SYSTEM + "socketProgress: Connection closed by remote peer n2<1>",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=8, OpType=ALLREDUCE) ran for 600000 ms",
]


def blame_of(message: str) -> Failure:
    return Failure("n1", 1, 5.0, f"DistBackendError: {message}")


@pytest.mark.parametrize("message", OWN)
def test_a_failure_of_its_own_is_blamed_in_its_own_words(message: str) -> None:
    """Also before an earlier failure of a rank that only lost it."""
    failure = DistBackendError(message)
    line = met_alone(failure)
    assert not has_lost_rank(failure) and line is not None and message.rpartition("\n")[2].split(" '")[0] in line
    assert blame_of(message).blame == 0
    other = Failure("n1", 0, 1.0, f"DistBackendError: {LOST[0]}")
    assert first_cause([other, blame_of(message)]) == blame_of(message)


@pytest.mark.parametrize("message", LOST)
def test_the_loss_of_another_rank_is_a_consequence(message: str) -> None:
    assert has_lost_rank(DistBackendError(message)) and blame_of(message).blame == 2


def test_a_wrong_call_of_nccl_is_a_bug() -> None:
    """It keeps its traceback."""
    wrong = DistBackendError(HEAD + "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5")
    assert met_alone(wrong) is None and not has_lost_rank(wrong)


def not_connected(message: str) -> NotConnected:
    failure = NotConnected("rank 0: the ranks cannot be connected: x; NCCL_DEBUG=INFO says more")
    failure.__cause__ = DistBackendError(message)
    return failure


@pytest.mark.parametrize(("messages", "blame"), [(OWN[:2], 0), (LOST, 2)])
def test_a_rank_that_is_lost_while_the_ranks_are_connected_is_blamed(
    messages: list[str], blame: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the rank that could not connect to it, unless its own GPU is why."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for message in messages:
        failure = not_connected(message)
        record_failure(failure, met_alone(failure) or "")
        assert read_error(tmp_path / "error.json", "n1", 0).blame == blame


def test_a_rank_that_cannot_be_connected_gives_the_advice_or_names_the_lost_rank() -> None:
    failure = not_connected(LOST[2])
    assert met_alone(failure) == f"NotConnected: {failure}"
    name_lost(failure, "lost rank 1 on n2: its process ended in setup")
    assert met_alone(failure) == "rank 0: lost rank 1 on n2: its process ended in setup"
