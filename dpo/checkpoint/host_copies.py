"""Copies of a sharded state in host memory, which do not change while training continues.

Three calls, by two threads, make a copy of a state on CUDA:

    training thread     take    enqueues the copies on a separate stream, behind the kernels that were enqueued so far
    training thread     hold    before the next update: makes the current stream wait for the copies
    checkpoint thread   wait    blocks until the copies are complete; then it reads them

On CPU `take` copies synchronously, and `hold` and `wait` do nothing.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dpo.distributed.shards import local


class HostCopies:
    """Copies a tree of tensors into buffers that are allocated at the first copy and reused at the next.

    Only this rank's shard of a DTensor is copied. The buffers take as much host memory as this rank's shards, tied
    tensors once. From CUDA, the copies run on a separate stream, so that they overlap with the computation, and go to
    pinned memory, for which torch rounds the bytes of each tensor up to a power of two.
    """

    def __init__(self, device: torch.device):
        self.buffers: dict[str, Tensor] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copied = torch.cuda.Event(blocking=True) if self.stream else None

    @torch.no_grad()
    def take(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Returns the tree with each tensor replaced by its copy. Overwrites the copies of the last call.

        Args:
            tree: nested dicts and lists with tensors; other leaves are returned as they are.

        From CUDA, the copies are still in flight: call `hold` before the tree changes, and `wait` before the copies are
        read.
        """
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        done: dict[tuple[int, torch.Size], Tensor] = {}
        with self._beside():
            copies = {key: self._copy(part, key, done) for key, part in tree.items()}
            if self.copied:
                self.copied.record()
        return copies

    def hold(self) -> None:
        """Makes the current CUDA stream wait until the copies are complete; the host does not wait."""
        if self.copied:
            torch.cuda.current_stream().wait_event(self.copied)

    def wait(self) -> None:
        """Blocks the calling thread until the copies are complete."""
        if self.copied:
            self.copied.synchronize()

    def _beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def _copy(self, part: Any, path: str, done: dict[tuple[int, torch.Size], Tensor]) -> Any:
        if isinstance(part, dict):
            return {key: self._copy(value, f"{path}/{key}", done) for key, value in part.items()}
        if isinstance(part, list):
            return [self._copy(value, f"{path}/{number}", done) for number, value in enumerate(part)]
        if not isinstance(part, Tensor):
            return part
        source = local(part)
        key = (source.data_ptr(), part.shape)
        if key in done:
            return done[key]
        copy = self.buffers.get(path)
        if copy is None or copy.shape != part.shape or copy.dtype != part.dtype:
            pinned = source.is_cuda and source.numel() > 0
            copy = self.buffers[path] = torch.empty_like(part, device="cpu", pin_memory=pinned)
        local(copy).copy_(source, non_blocking=True)
        if source.numel():
            done[key] = copy
        return copy
