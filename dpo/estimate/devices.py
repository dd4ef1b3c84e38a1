"""What a rank's device has and how it is connected, of a GPU by its data sheet (`dpo/machine/data_sheets.py`)."""

import os
from dataclasses import dataclass, replace

import torch

from dpo.machine.data_sheets import GIB, SHEETS, DataSheet, find_sheet, nearest_sheet
from dpo.machine.peaks import cpu_peak, device_peak


@dataclass(frozen=True)
class Device:
    """A kind of device. Speeds are bytes a second in one direction, of one device."""

    name: str
    """As `costs.device_peak` finds it; cpu is the processor of this machine."""
    memory: float
    """Bytes that programs can have."""
    link: float
    """To the other devices of its node (NVLink, Infinity Fabric; PCIe where there is neither)."""
    node_link: float
    """Its share of what a node has to other nodes: one network card of the usual kind a device."""
    host_link: float
    """To the memory of the host."""
    flops: float | None = None
    """FLOPs per second in any dtype; None: looked up for a GPU, measured for a CPU."""

    @property
    def is_cpu(self) -> bool:
        """Whether ranks compute on processors: attention then is a segment loop, and nothing is padded."""
        return self.name == "cpu"

    def process_bytes(self, peak: float) -> float:
        """What a process holds beside its tensors, assumed: the CUDA context, NCCL's buffers and kernels' workspaces
        2 GiB, and a twentieth of the peak in holes that the allocator cannot fill; on a CPU Python and its libraries.
        """
        return 0.75 * GIB if self.is_cpu else 2 * GIB + 0.05 * peak

    def needed(self, peak: float, host: float) -> float:
        """Bytes that must fit into the device's memory, of tensors there and on the host, which on a CPU are one."""
        return peak + self.process_bytes(peak) + (host if self.is_cpu else 0.0)

    def peak(self, dtype: str) -> float:
        """FLOPs a second at best in a compute dtype; of a CPU measured here, on one thread, torchrun's default."""
        if self.flops is not None:
            return self.flops
        if self.is_cpu:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return cpu_peak(getattr(torch, dtype), torch.get_num_threads())
            finally:
                torch.set_num_threads(threads)
        found = device_peak(self.name, dtype)
        assert found is not None, f"{self.name} has no peak for {dtype} in data_sheets.SHEETS"
        return found


LINK_SHARE = 0.8
"""Share of a link's rate in the data sheet that collectives of large tensors are taken to reach."""


def _device(sheet: DataSheet) -> Device:
    link, node_link, host_link = (1e9 * rate for rate in sheet.links)
    return Device(sheet.name, sheet.memory * GIB, LINK_SHARE * link, LINK_SHARE * node_link, host_link)


DEVICES = {sheet.key: _device(sheet) for sheet in SHEETS}
"""By the name that --device takes."""


def device_like(name: str, memory: float, capability: tuple[int, int]) -> tuple[Device, bool]:
    """The device of the table that a GPU is, by CUDA's name for it, its bytes and its compute capability, and whether
    its name is there. One that is not there is taken for its like (see `data_sheets.nearest_sheet`).
    """
    sheet = find_sheet(name, memory)
    return DEVICES[(sheet or nearest_sheet(memory, capability)).key], sheet is not None


CPU_FLOPS = 50e9
"""FLOPs a second of a CPU's rank in `steady`: of the order of what one thread does."""


def steady(device: Device, dtype: str) -> Device:
    """The device with a number of FLOPs a second that is the same at every start.

    That of a CPU would be measured: what is decided by it must not change with what else the machine does. In a dtype
    that is not in the table (float64) a GPU is taken for half as fast as in float32.
    """
    if device.is_cpu:
        return replace(device, flops=CPU_FLOPS)
    known = device_peak(device.name, dtype)
    return device if known else replace(device, flops=0.5 * device.peak("float32"))


def this_machine(ranks_per_node: int) -> Device:
    """The processor here: its memory divided by the ranks of a node; gloo on one machine copies at some 1 GB/s."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", memory / ranks_per_node, 1e9, 1e9, 1e9)
