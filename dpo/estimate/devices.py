"""The memory and the links of a rank's device; of a GPU by its data sheet (`dpo/machine/data_sheets.py`)."""

import os
from dataclasses import dataclass, replace

import torch

from dpo.machine.data_sheets import GIB, SHEETS, DataSheet, find_sheet, nearest_sheet
from dpo.machine.peaks import cpu_peak, device_peak


@dataclass(frozen=True)
class Device:
    """A kind of device. Links are in bytes per second in one direction, per device."""

    name: str
    """As `dpo.machine.peaks.device_peak` finds it; `cpu` is the processor of this machine."""
    memory: float
    """Bytes that programs can allocate."""
    link: float
    """To the other devices of its node (NVLink, Infinity Fabric; PCIe where there is neither)."""
    node_link: float
    """To other nodes: the device's share of the node's network cards, one usual card per device."""
    host_link: float
    """To the host's memory."""
    flops: float | None = None
    """FLOPs per second in any dtype; None: looked up for a GPU, measured for a CPU."""
    scatter_share: float = 1.0
    """The speed of a reduce-scatter as a share of that of an all-gather of as many bytes."""
    gather_copy: float = 0.0
    """Seconds per byte of an all-gathered tensor beside those of the link; see `measured.py`."""
    reduce_copy: float = 0.0
    """The same per byte of a reduced tensor."""
    activation: float = 0.0
    """Seconds of the arithmetic beside the matrix products, per element of the activations; see `measured.py`."""
    update: float = 0.0
    """Seconds of the optimizer per parameter of a rank's shard."""

    @property
    def is_cpu(self) -> bool:
        """Whether ranks compute on the processor, where attention is a segment loop and rows are not padded."""
        return self.name == "cpu"

    def process_bytes(self, peak: float) -> float:
        """Returns the bytes that a process is assumed to take beside its tensors.

        On a GPU: 2 GiB for the CUDA context, NCCL's buffers and the kernels' workspaces, and 5 % of the peak for holes
        that the allocator cannot fill. On a CPU: 0.75 GiB for Python and its libraries.
        """
        return 0.75 * GIB if self.is_cpu else 2 * GIB + 0.05 * peak

    def needed(self, peak: float, host: float) -> float:
        """Returns the bytes that must fit into the device's memory, for `peak` bytes of tensors on the device and
        `host` bytes on the host. On a CPU the two are the same memory.
        """
        return peak + self.process_bytes(peak) + (host if self.is_cpu else 0.0)

    def peak(self, dtype: str) -> float:
        """Returns the peak FLOPs per second in a compute dtype. That of a CPU is measured on one thread, torchrun's
        default.
        """
        if self.flops is not None:
            return self.flops
        if self.is_cpu:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return cpu_peak(getattr(torch, dtype), torch.get_num_threads())
            finally:
                torch.set_num_threads(threads)
        peak = device_peak(self.name, dtype)
        assert peak is not None, f"{self.name} has no peak for {dtype} in data_sheets.SHEETS"
        return peak


LINK_SHARE = 0.8
"""Share of a link's rate in the data sheet that collectives of large tensors are assumed to reach."""


def _device(sheet: DataSheet) -> Device:
    link, node_link, host_link = (1e9 * rate for rate in sheet.links)
    return Device(sheet.name, sheet.memory * GIB, LINK_SHARE * link, LINK_SHARE * node_link, host_link)


DEVICES = {sheet.key: _device(sheet) for sheet in SHEETS}
"""By the name that `--device` takes."""


def device_like(name: str, memory: float, capability: tuple[int, int]) -> tuple[Device, bool]:
    """Returns the device of the table for a GPU, and whether the table has its name.

    A GPU whose name is not in the table is assumed to be like its nearest entry (see `data_sheets.nearest_sheet`).

    Args:
        name: CUDA's name of the GPU.
        memory: its memory, bytes.
        capability: its compute capability, (major, minor).
    """
    sheet = find_sheet(name, memory)
    return DEVICES[(sheet or nearest_sheet(memory, capability)).key], sheet is not None


CPU_FLOPS = 50e9
"""FLOPs per second of a CPU's rank in `steady`: the order of magnitude of one thread."""


def steady(device: Device, dtype: str) -> Device:
    """Returns the device with FLOPs per second that are the same at every start; where a report gave them, these.

    The speed of a CPU would have to be measured, and a decision must not depend on the load of the machine. In a dtype
    that is not in the table (float64) a GPU is assumed to be half as fast as in float32.
    """
    if device.flops is not None:
        return device
    if device.is_cpu:
        return replace(device, flops=CPU_FLOPS)
    known = device_peak(device.name, dtype)
    return device if known else replace(device, flops=0.5 * device.peak("float32"))


def this_machine(ranks_per_node: int) -> Device:
    """Returns the processor of this machine: its memory divided by the ranks per node. gloo on one machine copies about
    1 GB/s.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", memory / ranks_per_node, 1e9, 1e9, 1e9)
