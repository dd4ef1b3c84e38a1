"""FLOPs a second that a device can do at most."""

import functools
import time

import torch

from dpo.machine.data_sheets import find_sheet


def device_peak(name: str, precision: str) -> float | None:
    """Peak FLOPs a second of a GPU by the name that CUDA gives, None where it is not in the table of `data_sheets`;
    `precision`: bfloat16, tf32, float32.
    """
    sheet = find_sheet(name)
    return sheet.peak(precision) if sheet else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOPs a second that this rank could do at best in a dtype: of a GPU from the table (None: it does not stand
    there), of a CPU measured, with the threads that torch has here, in a tenth of a second.
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
    return measured_peak(dtype)


def measured_peak(dtype: torch.dtype, size: int = 768, repeats: int = 12) -> float:
    """The best of some square matrix products on this CPU."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)
