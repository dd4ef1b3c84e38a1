"""torch's profiler over a few steps of a run: a trace for TensorBoard's plugin or ui.perfetto.dev, and a snapshot of
CUDA's memory for pytorch.org/memory_viz."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dpo.base.files import naming
from dpo.base.units import shown_seconds
from dpo.terminal.console import say

NUM_KERNELS = 10
"""The number of kernels that are told after a profile, those with the most time."""
MEMORY_EVENTS = 100_000
"""The maximum number of allocations in a memory snapshot, the latest; all ranks wait while it is written."""

StepHook = Callable[[int], None]
"""A function that is called with the number of a step, before it begins or after it has ended."""


def kernel_lines(profiler: profile, device: torch.device) -> list[str]:
    """Returns a line for each of the kernels (on a CPU the operators) that took the most time of their own: the share
    of the whole, the time, the number of calls, the name.
    """
    on_cpu = device.type == "cpu"
    key = "self_cpu_time_total" if on_cpu else "self_device_time_total"
    events = [event for event in profiler.key_averages() if (event.device_type == DeviceType.CPU) == on_cpu]
    times = [(float(getattr(event, key)) / 1e6, event) for event in events if not event.is_user_annotation]  # from µs
    total = sum(seconds for seconds, _ in times)
    first = sorted(times, key=lambda each: -each[0])[:NUM_KERNELS]
    return [
        f"  {seconds / total:6.1%}  {shown_seconds(seconds):>9}  {event.count:>7,} calls  {event.key[:80]}"
        for seconds, event in first
        if seconds > 0
    ]


@contextmanager
def profiled(steps: tuple[int, int] | None, folder: Path, device: torch.device) -> Iterator[tuple[StepHook, StepHook]]:
    """Records steps[0] to steps[1], inclusive; yields (begin, end), which must be called before and after each step.

    Writes `folder`/steps-10-12.pt.trace.json.gz, and on CUDA .memory.pickle, named after the recorded steps, and tells
    the kernels with the most time. Where the run ends earlier, writes the steps so far. Only one rank should record;
    the others pass None for `steps`.

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
        self.steps, self.folder, self.device = steps, folder, device
        self.on_cuda = device.type == "cuda"
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
        trace = self.folder / f"{name}.pt.trace.json.gz"
        with naming(trace):
            profiler.export_chrome_trace(str(trace))
        say(f"the trace of steps {self.first} to {self.last} is in {self.folder}; most time on the {self.device.type}:")
        for line in kernel_lines(profiler, self.device):
            say(line)
        if self.on_cuda:
            snapshot = self.folder / f"{name}.memory.pickle"
            with naming(snapshot):
                torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
