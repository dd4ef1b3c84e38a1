"""NCCL raises one exception for a lost rank and for a rank's own GPU: the message tells which."""

import pytest
from torch.distributed import DistBackendError

from dpo.command.blame import Failure, first_cause
from dpo.distributed.failures import has_lost_rank, met_alone

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
