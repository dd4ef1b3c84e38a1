"""What a rank's device has and how it is connected; what it can compute stands in `dpo/costs.py`."""

import os
from dataclasses import dataclass, replace

import torch

from dpo.costs import device_peak, known_device, measured_peak

GIB = 2**30


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
    """A second at best in any dtype, where that is not to be looked up or measured."""

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
                return measured_peak(getattr(torch, dtype))
            finally:
                torch.set_num_threads(threads)
        found = device_peak(self.name, dtype)
        assert found is not None, f"{self.name} has no peak for {dtype} in costs.PEAKS"
        return found


LINK_SHARE = 0.8
"""Share of a link's rate in the data sheet that collectives of large tensors are taken to reach."""


def _gpu(name: str, memory: float, link: float, node_link: float, host_link: float) -> Device:
    """A device by its data sheet: memory in GiB, links in GB/s."""
    return Device(name, memory * GIB, LINK_SHARE * link * 1e9, LINK_SHARE * node_link * 1e9, host_link * 1e9)


DEVICES = {
    "gb200": _gpu("GB200", 184, 900, 50, 450),
    "b200": _gpu("B200", 178, 900, 50, 64),
    "h200": _gpu("H200", 139.8, 450, 50, 64),
    "h100": _gpu("H100", 79.1, 450, 50, 64),
    "h100-pcie": _gpu("H100 PCIe", 79.1, 64, 25, 64),
    "a100": _gpu("A100", 79.2, 300, 25, 32),
    "a100-40gb": _gpu("A100", 39.4, 300, 25, 32),
    "l40s": _gpu("L40S", 44.4, 32, 12.5, 32),
    "l4": _gpu("L4", 22.0, 32, 12.5, 32),
    "a10": _gpu("A10", 22.0, 32, 12.5, 32),
    "mi300x": _gpu("MI300X", 191.5, 448, 50, 64),
}
"""By the name that --device takes. Memory is what torch sees, some per cent below the name on the box."""


def device_like(name: str, memory: float) -> tuple[Device, bool]:
    """The device of the table that a GPU is, by CUDA's name for it and by its bytes, and whether its name is there. One
    that is not there is taken for the one whose memory is nearest.
    """
    words = known_device(name)
    same = [device for device in DEVICES.values() if device.name == words]
    nearest = min(same or DEVICES.values(), key=lambda device: abs(device.memory - memory))
    return nearest, bool(same)


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
