"""torch's profiler over a few steps of a run: a trace for TensorBoard's plugin or ui.perfetto.dev, and a snapshot of
CUDA's memory for pytorch.org/memory_viz."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dpo.base.console import say

MEMORY_EVENTS = 100_000
"""The maximum number of allocations in a memory snapshot, the latest; all ranks wait while it is written."""

StepHook = Callable[[int], None]
"""A function that is called with the number of a step, before it begins or after it has ended."""


@contextmanager
def profiled(steps: tuple[int, int] | None, folder: Path, device: torch.device) -> Iterator[tuple[StepHook, StepHook]]:
    """Records steps[0] to steps[1], inclusive; yields (begin, end), which must be called before and after each step.

    Writes `folder`/steps-10-12.pt.trace.json, and on CUDA .memory.pickle, named after the recorded steps. Where the run
    ends earlier, writes the steps so far. Only one rank should record; the others pass None for `steps`.

    Args:
        steps: the first and the last step to record, from 1; None records nothing.
        folder: the folder of the traces; made when they are written.
        device: the device of the steps, whose kind decides what is recorded.
    """
    recorder = _Recorder(steps, folder, device)
    try:
        yield recorder.begin, recorder.end
    finally:
        recorder.finish()


class _Recorder:
    """Starts and stops torch's profiler; `profiler` is None where it does not run."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, device: torch.device):
        self.steps, self.folder, self.on_cuda = steps, folder, device.type == "cuda"
        self.profiler: profile | None = None
        self.first = self.last = 0
        """The first and the last recorded step."""

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
        """Stops the profiler and writes the recorded steps, if any."""
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
