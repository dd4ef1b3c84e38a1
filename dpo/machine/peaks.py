"""The maximum FLOPs per second of a device: from the data sheet of a GPU, measured on a CPU."""

import functools
import time

import torch

from dpo.machine.data_sheets import find_sheet

QUICK_REPEATS = 4
"""Products that measure a CPU at each start, which waits for them; dpo.doctor takes more."""


def device_peak(name: str, precision: str) -> float | None:
    """Returns the peak FLOPs per second of a GPU, or None if `data_sheets` does not list it.

    Args:
        name: as CUDA gives it.
        precision: bfloat16, tf32 or float32.
    """
    sheet = find_sheet(name)
    return sheet.peak(precision) if sheet else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the maximum FLOPs per second of this rank in a dtype.

    The value of a GPU is its data sheet's (None if it has none). A CPU is measured in about 0.05 s, with the threads
    that torch uses in this process.
    """
    if device.type == "cpu":
        return cpu_peak(dtype, torch.get_num_threads())
    precision = str(dtype).removeprefix("torch.")
    if precision == "float32" and torch.backends.cuda.matmul.allow_tf32:
        precision = "tf32"
    return device_peak(torch.cuda.get_device_name(device), precision)


@functools.cache
def cpu_peak(dtype: torch.dtype, num_threads: int) -> float:
    """Returns the peak of this CPU with the threads that torch has here, measured once per process."""
    assert num_threads == torch.get_num_threads(), "it is measured with the threads that torch has"
    return measured_peak(dtype, repeats=QUICK_REPEATS)


def measured_peak(dtype: torch.dtype, size: int = 768, repeats: int = 12) -> float:
    """Measures square matrix products on this CPU; returns the FLOPs per second of the fastest.

    Args:
        dtype: the dtype of the operands.
        size: rows and columns of the operands.
        repeats: number of products.
    """
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)
