"""A profiled run: the trace holds the asked steps and no others, and changes nothing."""

import gzip
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dpo.run_folder.files import read_metrics
from dpo.train.profiling import MEMORY_EVENTS, kernel_lines, profiled
from tests.support.runs import run, save_six_steps, six_steps, without_clock


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("profiling")
    save_six_steps(root)
    run(six_steps(root, root / "plain"))
    return root


def optimizer_steps(trace: Path) -> int:
    """How many updates a trace saw; Perfetto and TensorBoard's plugin read this form of JSON."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sum(event.get("name", "").startswith("Optimizer.step#") and event.get("ph") == "X" for event in events)


@pytest.mark.parametrize(("steps", "count"), [((2, 4), 3), ((5, 9), 2), ((3, 3), 1)])
def test_the_trace_holds_the_asked_steps(root: Path, tmp_path: Path, steps: tuple[int, int], count: int) -> None:
    """Steps 5 to 9 of a run of 6 are two steps. The metrics stay what they are, to the last bit."""
    folder = run(six_steps(root, tmp_path / "run", train__profile_steps=steps))
    [trace] = (folder / "profile").iterdir()
    assert trace.name == f"steps-{steps[0]}-{min(steps[1], 6)}.pt.trace.json.gz"
    assert optimizer_steps(trace) == count
    lines = [without_clock(read_metrics(each))[1:] for each in (folder, root / "plain")]
    assert lines[0] == lines[1]


def test_the_kernels_with_the_most_time_are_told() -> None:
    """80 products of large matrices and one sum: the products come first, with their number; at most ten lines."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        a = torch.ones(256, 256)
        for _ in range(80):
            a @ a
        a.sum().exp().log().sin().cos().tan().sqrt().neg().abs().relu().sigmoid().tanh()
    lines = kernel_lines(profiler, torch.device("cpu"))
    assert len(lines) == 10
    assert lines[0].split()[-3:] == ["80", "calls", "aten::mm"]
    shares = [float(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.5


def test_on_cuda_kernels_are_told_and_not_the_operators_that_launch_them() -> None:
    """An operator has the time of its kernels too, and so has a named span of the program: 3 of 4 ms are of gemm."""

    def event(name: str, kind: DeviceType, microseconds: float, is_user_annotation: bool = False) -> Any:
        return Mock(
            key=name,
            device_type=kind,
            self_device_time_total=microseconds,
            self_cpu_time_total=9e6,
            count=2,
            is_user_annotation=is_user_annotation,
        )

    events = [
        event("aten::mm", DeviceType.CPU, 3000),
        event("Optimizer.step#SGD", DeviceType.CUDA, 5000, is_user_annotation=True),
        event("add", DeviceType.CUDA, 1000),
        event("gemm", DeviceType.CUDA, 3000),
    ]
    lines = kernel_lines(Mock(key_averages=lambda: events), torch.device("cuda"))
    assert lines == ["   75.0%     3.0 ms        2 calls  gemm", "   25.0%     1.0 ms        2 calls  add"]


def test_steps_that_never_come_leave_no_trace(root: Path, tmp_path: Path) -> None:
    folder = run(six_steps(root, tmp_path / "run", train__profile_steps=(10, 12)))
    assert not (folder / "profile").exists()


def test_on_cuda_the_memory_is_recorded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that no machine without a GPU can make, in their order; `end` after the last step writes both files."""
    calls: list[tuple[str, dict[str, object]]] = []
    memory = "torch.cuda.memory."
    monkeypatch.setattr(memory + "_record_memory_history", lambda **facts: calls.append(("record", facts)))
    monkeypatch.setattr(memory + "_dump_snapshot", lambda path: calls.append(("dump", {"path": path})))
    monkeypatch.setattr("dpo.train.profiling.profile", Mock(return_value=Mock(key_averages=list)))
    with profiled((2, 3), tmp_path, torch.device("cuda")) as (begin, end):
        for step in (1, 2, 3, 4):
            begin(step)
            end(step)
    assert calls == [
        ("record", {"max_entries": MEMORY_EVENTS, "stacks": "python"}),
        ("dump", {"path": str(tmp_path / "steps-2-3.memory.pickle")}),
        ("record", {"enabled": None}),
    ]
