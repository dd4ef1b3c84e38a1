"""Reports of failures that one rank meets alone: memory that runs out, a full disk, a lost connection.

Rank 1 of 2 runs out of memory in a backward pass, while rank 0 waits for it in a collective. On stderr:

    rank 1      error: rank 1: out of GPU memory: 2.50 GiB were asked for; the peak was 76.90 GiB of tensors, 78.08 GiB
                reserved, of 79.11 GiB; by the estimate a step needs 77.41 GiB; what helps: ...
    rank 0      over gloo, error: rank 0: lost rank 1 on node1: out of GPU memory: ...; over NCCL nothing, since it
                waits until torchrun or the watcher of its node (`dpo.watch.watcher`) ends it
    torchrun    sees a rank end, ends the others, and prints the line of each rank that has one

A rank that prints a line also writes it to the file from which torchrun takes it, and ends with exit code 1.
"""

import errno
import os
import re
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from dpo.base.errors import RunError, UserError, one_line
from dpo.base.files import nearest_existing
from dpo.base.full_disk import CAUSES, full_code
from dpo.base.space import free_room
from dpo.base.units import shown_bytes
from dpo.command.blame import is_lost_by_backend, write_error
from dpo.command.exits import exit_code_of, line_of
from dpo.command.line import split_options, words_of
from dpo.machine.data_sheets import GIB, find_sheet
from dpo.watch.arrival import SaidByAnother


class NotConnected(ConnectionError):
    """The ranks cannot be connected: another rank is lost, the network is wrong, or this rank's GPU is; the exception
    from which it is raised tells which.
    """


def record_failure(failure: Exception, details: str) -> None:
    """Writes why and when this rank failed to the file that torchrun names, if any (`write_error`)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        user_line = line_of(failure) if isinstance(failure, (UserError, RunError)) else ""
        extra = {"seconds": time.time(), "exit_code": exit_code_of(failure), "user_line": user_line}
        if has_lost_rank(failure):
            extra["is_consequence"] = True
        with suppress(OSError):  # the disk is full: the rank still prints its line
            write_error(Path(path), f"{type(failure).__name__}: {failure}", details, extra)


@contextmanager
def storage_errors(folder: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turns the exception of torch's distributed checkpoint for a rank that cannot read or write `folder` into a
    RunError. All ranks raise it alike. `num_bytes`: of all files that the block writes.
    """
    try:
        yield
    except CheckpointException as failure:
        rank, (reason, _) = next(iter(failure.failures.items()))
        code, size = _full_code(reason, folder, num_bytes), f", {shown_bytes(num_bytes)} in all" if num_bytes else ""
        room = free_room(folder.parent, code or 0)
        full = f"{CAUSES.get(code or 0)}: rank {rank} cannot write {folder}{size}{room}"
        raise RunError(full if code else f"{folder}: rank {rank}: {line_of(reason)}{room}") from failure


def _full_code(failure: BaseException, folder: Path, num_bytes: int | None) -> int | None:
    """Returns the key of CAUSES for which a write failed; None for another failure. Where torch has dropped it, it is
    seen from what `num_bytes` find: less room, a lower limit on the size of a file, or neither, as under a quota.
    """
    code = full_code(failure)
    if code is not None or not _FULL.search(str(failure)):
        return code
    if shutil.disk_usage(nearest_existing(folder)).free < (num_bytes or 0):
        return errno.ENOSPC
    has_limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if has_limit else errno.EDQUOT


_FULL = re.compile(r"inline_container\.cc.*(unexpected pos|file write failed)")
"""Messages of torch's writer of tensors where a file takes no more bytes; it drops the system's error:
https://github.com/pytorch/pytorch/blob/main/caffe2/serialize/inline_container.cc"""


@contextmanager
def remembered_need(need: str | None) -> Iterator[None]:
    """Adds the estimated memory of a step to any out-of-memory failure that the with-block raises, as a note that
    `met_alone` prints. `need` is a text such as `71.2 GiB`; None: not known.
    """
    try:
        yield
    except Exception as failure:
        if need is not None and _without_memory(failure) is not None:
            failure.add_note(f"{_NOTE} {need}")
        raise


_NOTE = "by the estimate a step needs"


def met_alone(failure: Exception) -> str | None:
    """Returns the one-line message for a failure that this rank may be alone with (memory, disk, connection), or None
    for a bug, which keeps its traceback.
    """
    without = _without_memory(failure)
    if without is not None:
        kind, cause = without
        peak = _device_peak() if kind == "GPU" else _host_peak()
        need = [note for note in getattr(failure, "__notes__", ()) if note.startswith(_NOTE)]
        return _named(f"out of {kind} memory: {_asked(cause)}; {'; '.join([peak, *need, _remedy()])}")
    if isinstance(failure, OSError) or full_code(failure) is not None:
        lost = _noted_loss(failure)
        return _named(lost) if lost else line_of(failure)
    if has_lost_rank(failure):
        return _named(_noted_loss(failure) or _lost_words(failure))
    return _named(line_of(failure)) if _is_broken_backend(failure) else None


def _is_broken_backend(failure: BaseException) -> bool:
    """Returns whether NCCL failed by this rank's own GPU or system; a wrong call of it is a bug."""
    is_backends = isinstance(failure, torch.distributed.DistBackendError)
    return is_backends and bool(_BROKEN_BACKEND.search(str(failure)))


_BROKEN_BACKEND = re.compile(r"unhandled (cuda|system) error|ncclUnhandledCudaError|ncclSystemError|Cuda failure")
"""https://github.com/NVIDIA/nccl/blob/master/src/init.cc, `ncclGetErrorString`"""


def _lost_words(failure: BaseException) -> str:
    """Returns what this rank saw of the loss of another one."""
    said = one_line(str(failure))
    if is_timeout(failure):
        return f"waited for the other ranks in vain ({said})"
    return f"the connection to another rank was lost ({said}): that rank's own message says why"


def _noted_loss(failure: BaseException) -> str:
    """Returns the rank that was lost and why (`name_lost`); empty where that is not known."""
    notes: list[str] = getattr(failure, "__notes__", [])
    return next((note.removeprefix(_LOST_NOTE) for note in notes if note.startswith(_LOST_NOTE)), "")


def name_lost(failure: BaseException, words: str) -> None:
    """Notes, on the failure of a rank that lost another, which rank that is and why; `met_alone` prints it."""
    failure.add_note(f"{_LOST_NOTE}{words}")


_LOST_NOTE = "lost: "


def has_lost_rank(failure: BaseException) -> bool:
    """Returns whether a rank failed because another one has ended, or does not answer; not where its own memory ran
    out, or its GPU failed, which NCCL tells by the same exception.
    """
    if _without_memory(failure) is not None:
        return False
    if isinstance(failure, NotConnected) and failure.__cause__ is not None:
        return has_lost_rank(failure.__cause__)
    if isinstance(failure, torch.distributed.DistBackendError):
        return is_lost_by_backend(str(failure))
    is_message = _is_runtime(failure) and bool(_LOST.search(str(failure)))
    return is_message or isinstance(failure, torch.distributed.DistError | SaidByAnother)


def is_timeout(failure: BaseException) -> bool:
    """Returns whether a rank that lost another one has waited for it until a timeout."""
    return bool(_TIMEOUT.search(str(failure)))


_NO_DEVICE_MEMORY = re.compile(
    r"(CUDA|HIP) (error: )?out of memory|(CUDA|HIP) failure 2\b|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""Messages of the allocator, the runtime, NCCL (`Cuda failure 2 'out of memory'`, src/include/checks.h) and cuBLAS."""
_NO_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"
_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|gloo/transport/.*Timed out waiting|gloo.*Connect")
"""Messages of gloo: https://github.com/pytorch/gloo/blob/main/gloo/transport/tcp/pair.cc and unbound_buffer.cc"""
_TIMEOUT = re.compile(r"[Tt]imed? ?out|timeout")


def _without_memory(failure: BaseException) -> tuple[str, BaseException] | None:
    """Returns the memory that ran out, "GPU" or "host", and the failure in the chain of causes that says so; None if
    `failure` has another cause.
    """
    for cause in _causes(failure):
        if isinstance(cause, torch.OutOfMemoryError) or (_is_runtime(cause) and _NO_DEVICE_MEMORY.search(str(cause))):
            return "GPU", cause
        if isinstance(cause, MemoryError) or _has_no_host_memory(cause):
            return "host", cause
    return None


def _causes(failure: BaseException | None) -> Iterator[BaseException]:
    while failure is not None:
        yield failure
        failure = failure.__cause__


def _is_runtime(failure: BaseException) -> bool:
    return isinstance(failure, RuntimeError)


def _has_no_host_memory(failure: BaseException) -> bool:
    if isinstance(failure, OSError):
        return failure.errno == errno.ENOMEM  # raised by fork and by mmap
    return _is_runtime(failure) and _NO_HOST_MEMORY in str(failure)


def _named(text: str) -> str:
    return f"rank {os.environ.get('RANK', '0')}: {text}"


def _asked(failure: BaseException) -> str:
    """Returns the size of the allocation that failed, in words, or the message of a failure that does not name it."""
    text = str(failure)
    if size := re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", text):
        return f"{size[1]} were asked for"
    if count := re.search(r"tried to allocate (\d+) bytes", text):
        return f"{int(count[1]) / GIB:.2f} GiB were asked for"
    return one_line(str(failure)) or "its size is not known"


def _device_peak() -> str:
    if not torch.cuda.is_initialized():
        return "the GPU was not in use yet"
    held, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    total = torch.cuda.get_device_properties().total_memory / GIB
    return f"the peak was {held:.2f} GiB of tensors, {reserved:.2f} GiB reserved, of {total:.2f} GiB"


def _host_peak() -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # KiB on Linux
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"the peak of this process was {peak:.2f} GiB, of the {total:.2f} GiB that the ranks of a node share"


def _remedy() -> str:
    command = estimate_command(sys.argv[1:])
    if command is None:
        return "what helps: more ranks, each of which then holds less of the model"
    unknown = "" if _this_device() else " (NAME: the nearest of python -m dpo.estimate --help)"
    return (
        "what helps: a smaller batch.tokens_per_micro_batch, parallel.activation_checkpointing full,"
        " parallel.sync_gradients every_micro_batch (or, on a GPU, parallel.cpu_offload true);"
        f" for the memory of a step and settings that fit, run: {command}{unknown}"
    )


def estimate_command(argv: Sequence[str]) -> str | None:
    """Returns the command that estimates the memory of a step on these ranks, for the command line of a program; None
    if that command line has no key of the config.
    """
    words = words_of([option for option in split_options(argv) if option.is_config])
    ranks = os.environ.get("WORLD_SIZE", "1")
    on_a_node = os.environ.get("LOCAL_WORLD_SIZE", ranks)
    nodes = ["--ranks-per-node", on_a_node] if on_a_node != ranks else []
    here = ["--ranks", ranks, *nodes, "--device", _this_device() or "NAME"]
    return f"python -m dpo.estimate {shlex.join([*words, *here])}" if words else None


def _this_device() -> str | None:
    if not torch.cuda.is_initialized():
        return "cpu"
    properties = torch.cuda.get_device_properties()
    return estimate_name(properties.name, properties.total_memory)


def estimate_name(name: str, memory: float) -> str | None:
    """Returns the name of a GPU for `dpo.estimate --device`, or None if the GPU has no data sheet.

    Args:
        name: as CUDA gives it.
        memory: of the GPU, in bytes.
    """
    sheet = find_sheet(name, memory)
    return sheet.key if sheet else None
