"""torch's profiler over a few steps of a run: a trace for TensorBoard's plugin or ui.perfetto.dev, and a snapshot of
CUDA's memory for pytorch.org/memory_viz."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dpo.base.console import say

MEMORY_EVENTS = 100_000
"""Allocations that a memory snapshot remembers, the latest ones; all ranks wait while it is written."""

StepHook = Callable[[int], None]
"""Called with the number of a step that is about to begin, or of one that has ended."""


@contextmanager
def profiled(steps: tuple[int, int] | None, folder: Path, device: torch.device) -> Iterator[tuple[StepHook, StepHook]]:
    """Gives (begin, end), to be called around every step: what runs from the begin of steps[0] to the end of steps[1]
    is recorded into `folder`/steps-10-12.pt.trace.json (and .memory.pickle on CUDA), named by what it holds.

    A run that ends earlier writes what it has. For one rank: others give None for `steps` and record nothing.
    """
    recorder = _Recorder(steps, folder, device)
    try:
        yield recorder.begin, recorder.end
    finally:
        recorder.finish()


class _Recorder:
    """The profiler while it runs; None before and after."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, device: torch.device):
        self.steps, self.folder, self.on_cuda = steps, folder, device.type == "cuda"
        self.profiler: profile | None = None
        self.first = self.last = 0
        """Steps that were recorded."""

    def begin(self, step: int) -> None:
        if self.steps is None or self.profiler is not None or not self.steps[0] <= step <= self.steps[1]:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_cuda
        self.profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        if self.on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        self.profiler.start()
        self.first = step

    def end(self, step: int) -> None:
        self.last = step
        if self.steps is not None and step >= self.steps[1]:
            self.finish()

    def finish(self) -> None:
        """Writes what was recorded, if anything is."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self.first}-{self.last}"
        profiler.export_chrome_trace(str(self.folder / f"{name}.pt.trace.json"))
        say(f"the trace of steps {self.first} to {self.last} is in {self.folder}")
        if self.on_cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
