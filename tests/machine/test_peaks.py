"""The peak of a CPU, as a start measures it."""

import pytest
import torch

from dpo.machine import peaks
from dpo.machine.peaks import QUICK_REPEATS, cpu_peak


def test_a_start_measures_few_products_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of them counts: 2 size^3 operations in half a second."""
    shapes, now = [], [0.0]

    def multiply(a: torch.Tensor, b: torch.Tensor) -> None:
        shapes.append((a.shape, b.shape))
        now[0] += 0.5 if len(shapes) == 2 else 0.7

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(peaks.time, "perf_counter", lambda: now[0])
    cpu_peak.cache_clear()
    try:
        found = [cpu_peak(torch.float32, torch.get_num_threads()) for _ in range(2)]
    finally:
        cpu_peak.cache_clear()
    size = shapes[0][0][0]
    assert len(shapes) == QUICK_REPEATS and found == [pytest.approx(4.0 * size**3)] * 2
