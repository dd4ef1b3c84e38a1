"""Copies in host memory of a state that lies on devices, sharded: they stay as they are while training goes on."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class HostCopies:
    """Buffers for copies of a tree of tensors, made at the first copy and used again at the next ones.

    Of a sharded tensor it is this rank's part that is copied: the buffers take as many bytes of host memory as the part
    of the tree that this rank holds, tied tensors once. What comes from CUDA is copied to pinned memory, of which torch
    gives a power of two for each tensor, on a stream of its own, beside what the device computes meanwhile.
    """

    def __init__(self, device: torch.device):
        self.buffers: dict[str, Tensor] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copied = torch.cuda.Event(blocking=True) if self.stream else None

    @torch.no_grad()
    def take(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The tree, each tensor replaced by its copy. The copies of the last call must not be needed any more.

        From a CPU they are whole at once. From CUDA they are on their way: before the tree changes call `hold`, before
        the copies are read call `wait`.
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
        """The device goes on with nothing that the host asks for from now on before it has copied; the host does not
        wait.
        """
        if self.copied:
            torch.cuda.current_stream().wait_event(self.copied)

    def wait(self) -> None:
        """Waits until the copies are whole."""
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
        source = _local(part)
        key = (source.data_ptr(), part.shape)
        if key in done:
            return done[key]
        copy = self.buffers.get(path)
        if copy is None or copy.shape != part.shape or copy.dtype != part.dtype:
            pinned = source.is_cuda and source.numel() > 0
            copy = self.buffers[path] = torch.empty_like(part, device="cpu", pin_memory=pinned)
        _local(copy).copy_(source, non_blocking=True)
        if source.numel():
            done[key] = copy
        return copy


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
