"""What a rank's device has and how it is connected; what it can compute stands in `dpo/costs.py`."""

import os
from dataclasses import dataclass

import torch

from dpo.costs import device_peak, measured_peak

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A kind of device. Speeds are bytes a second in one direction, of one device, from the makers' data sheets."""

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
        if self.is_cpu:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return measured_peak(getattr(torch, dtype))
            finally:
                torch.set_num_threads(threads)
        found = device_peak(self.name, dtype)
        assert found is not None, f"{self.name} has no peak for {dtype} in costs.PEAKS"
        return found


DEVICES = {
    "gb200": Device("GB200", 184 * GIB, 900e9, 50e9, 450e9),
    "b200": Device("B200", 178 * GIB, 900e9, 50e9, 64e9),
    "h200": Device("H200", 139.8 * GIB, 450e9, 50e9, 64e9),
    "h100": Device("H100", 79.1 * GIB, 450e9, 50e9, 64e9),
    "h100-pcie": Device("H100 PCIe", 79.1 * GIB, 64e9, 25e9, 64e9),
    "a100": Device("A100", 79.2 * GIB, 300e9, 25e9, 32e9),
    "a100-40gb": Device("A100", 39.4 * GIB, 300e9, 25e9, 32e9),
    "l40s": Device("L40S", 44.4 * GIB, 32e9, 12.5e9, 32e9),
    "l4": Device("L4", 22.0 * GIB, 32e9, 12.5e9, 32e9),
    "a10": Device("A10", 22.0 * GIB, 32e9, 12.5e9, 32e9),
    "mi300x": Device("MI300X", 191.5 * GIB, 448e9, 50e9, 64e9),
}
"""By the name that --device takes. Memory is what torch sees, some per cent below the name on the box."""


def this_machine(ranks_per_node: int) -> Device:
    """The processor here: its memory divided by the ranks of a node; gloo on one machine copies at some 1 GB/s."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", memory / ranks_per_node, 1e9, 1e9, 1e9)
