"""A table of GPUs from the data sheets of their makers, found by the name that CUDA gives or by a key."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30

DEFAULT_MFU = 0.4
"""Share of its peak that a device's arithmetic is assumed to reach."""


@dataclass(frozen=True)
class DataSheet:
    """The data sheet of one kind of GPU."""

    key: str
    """The name of the GPU for `dpo.estimate --device`."""
    words: str
    """A regular expression that matches words of the name that CUDA gives, and of `name`."""
    name: str
    """The name that users read."""
    capability: tuple[int, int]
    """Compute capability (major, minor), as torch reports it."""
    memory: float
    """GiB available to programs, as torch reports them: a few per cent less than advertised."""
    peaks: tuple[float, float, float]
    """Dense TFLOP/s in bfloat16 (accumulated in float32), TF32 and float32."""
    links: tuple[float, float, float]
    """GB/s in one direction to the other GPUs of the node (NVLink or Infinity Fabric; PCIe for GPUs with neither, or
    with bridges between pairs only), to other nodes (one network card of the usual kind), and to host memory.
    """
    source: str
    """Address of the data sheet for the peaks and the links within a node."""

    def peak(self, precision: str) -> float | None:
        """Returns the peak FLOPs per second in bfloat16, tf32 or float32; None for another precision."""
        peaks = dict(zip(("bfloat16", "tf32", "float32"), self.peaks, strict=True))
        return 1e12 * peaks[precision] if precision in peaks else None


_NVIDIA = "https://www.nvidia.com/en-us"
_GB300 = f"{_NVIDIA}/data-center/gb300-nvl72/"
_GB200 = f"{_NVIDIA}/data-center/gb200-nvl72/"
_HGX = f"{_NVIDIA}/data-center/hgx/"
_GH200 = f"{_NVIDIA}/data-center/grace-hopper-superchip/"
_H200, _H100, _A100 = (f"{_NVIDIA}/data-center/{name}/" for name in ("h200", "h100", "a100"))
_HOPPER = "https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c"
_H20 = "https://zangshuxian.com/new/674733024499207168"  # NVIDIA publishes no data sheet of it
_A10G = "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"
_A30, _A10 = (f"{_NVIDIA}/data-center/products/{name}-gpu/" for name in ("a30", "a10"))
_A40, _L40S, _L40, _L4 = (f"{_NVIDIA}/data-center/{name}/" for name in ("a40", "l40s", "l40", "l4"))
_A6000, _RTX_6000 = (f"{_NVIDIA}/design-visualization/{name}/" for name in ("rtx-a6000", "rtx-6000"))
_PRO = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/"
    "NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf"
)
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_RTX_50 = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_MI300X = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"

SHEETS: Sequence[DataSheet] = (
    DataSheet("gb300", "GB300", "GB300", (10, 3), 276, (2500, 1250, 80), (900, 100, 450), _GB300),
    DataSheet("gb200", "GB200", "GB200", (10, 0), 184, (2500, 1250, 80), (900, 50, 450), _GB200),
    DataSheet("b300", "B300", "B300", (10, 3), 267, (2250, 1125, 75), (900, 100, 64), _HGX),
    DataSheet("b200", "B200", "B200", (10, 0), 178, (2250, 1125, 75), (900, 50, 64), _HGX),
    DataSheet("gh200", "GH200", "GH200", (9, 0), 94.5, (989, 494, 67), (450, 50, 450), _GH200),
    DataSheet("h200", "H200(?! NVL)", "H200", (9, 0), 139.8, (989, 494, 67), (450, 50, 64), _H200),
    DataSheet("h200-nvl", "H200 NVL", "H200 NVL", (9, 0), 139.8, (835.5, 417.5, 60), (64, 50, 64), _H200),
    DataSheet("h100", "H100(?! (PCIe|NVL))", "H100", (9, 0), 79.1, (989, 494, 67), (450, 50, 64), _H100),
    DataSheet("h100-nvl", "H100 NVL", "H100 NVL", (9, 0), 93.1, (835.5, 417.5, 60), (64, 50, 64), _H100),
    DataSheet("h100-pcie", "H100 PCIe", "H100 PCIe", (9, 0), 79.1, (756, 378, 51), (64, 25, 64), _HOPPER),
    DataSheet("h20", "H20", "H20", (9, 0), 95.0, (148, 74, 44), (450, 50, 64), _H20),
    DataSheet("a100", "A100(?!.*PCIe)", "A100", (8, 0), 79.2, (312, 156, 19.5), (300, 25, 32), _A100),
    DataSheet("a100-40gb", "A100(?!.*PCIe)", "A100", (8, 0), 39.4, (312, 156, 19.5), (300, 25, 32), _A100),
    DataSheet("a100-pcie", "A100(?=.*PCIe)", "A100 PCIe", (8, 0), 79.2, (312, 156, 19.5), (32, 25, 32), _A100),
    DataSheet("a100-pcie-40gb", "A100(?=.*PCIe)", "A100 PCIe", (8, 0), 39.4, (312, 156, 19.5), (32, 25, 32), _A100),
    DataSheet("a30", "A30", "A30", (8, 0), 23.5, (165, 82, 10.3), (32, 12.5, 32), _A30),
    DataSheet("a40", "A40", "A40", (8, 6), 44.4, (149.7, 74.8, 37.4), (32, 12.5, 32), _A40),
    DataSheet("a10", "A10", "A10", (8, 6), 22.0, (125, 62.5, 31.2), (32, 12.5, 32), _A10),
    DataSheet("a10g", "A10G", "A10G", (8, 6), 22.0, (70, 35, 35), (32, 12.5, 32), _A10G),
    DataSheet("rtx-a6000", "RTX A6000", "RTX A6000", (8, 6), 47.4, (154.8, 77.4, 38.7), (32, 12.5, 32), _A6000),
    DataSheet("l40s", "L40S", "L40S", (8, 9), 44.4, (362, 183, 91.6), (32, 12.5, 32), _L40S),
    DataSheet("l40", "L40", "L40", (8, 9), 44.4, (181, 90.5, 90.5), (32, 12.5, 32), _L40),
    DataSheet("l4", "L4", "L4", (8, 9), 22.0, (121, 60, 30.3), (32, 12.5, 32), _L4),
    DataSheet(
        "rtx-6000-ada", "RTX 6000 Ada", "RTX 6000 Ada", (8, 9), 44.4, (364.2, 182.1, 91.1), (32, 12.5, 32), _RTX_6000
    ),
    DataSheet("rtx-4090", "4090(?! [DL])", "RTX 4090", (8, 9), 23.6, (165.2, 82.6, 82.6), (32, 12.5, 32), _ADA),
    DataSheet("rtx-pro-6000", "RTX PRO 6000", "RTX PRO 6000", (12, 0), 95.0, (503.8, 251.9, 125), (64, 25, 64), _PRO),
    DataSheet(
        "rtx-5090",
        "5090(?! [DL])",
        "RTX 5090",
        (12, 0),
        31.4,
        (209.5, 104.8, 104.8),
        (64, 12.5, 64),
        _RTX_50,
    ),
    DataSheet("mi300x", "MI300X", "MI300X", (9, 4), 191.5, (1307, 654, 163), (448, 50, 64), _MI300X),
)
"""Whole words match: an A10G is no A10, an L40 no L4. The memory decides between GPUs of the same name."""


def find_sheet(name: str, memory: float | None = None) -> DataSheet | None:
    """Returns the data sheet of a GPU, or None if the table has none.

    Args:
        name: as CUDA gives it.
        memory: bytes; decides between GPUs of the same name. None: the first of them.
    """
    sheets = [sheet for sheet in SHEETS if re.search(rf"\b{sheet.words}\b", name, re.IGNORECASE)]
    return _nearest_memory(sheets, memory) if sheets else None


def nearest_sheet(memory: float, capability: tuple[int, int]) -> DataSheet:
    """Returns the data sheet that is used for a GPU that is not in the table: the nearest in memory (bytes) of the GPUs
    with the same compute capability, or if there is none of the same major capability, or if there is none of all.
    """
    same_capability = [sheet for sheet in SHEETS if sheet.capability == capability]
    same_generation = [sheet for sheet in SHEETS if sheet.capability[0] == capability[0]]
    return _nearest_memory(same_capability or same_generation or SHEETS, memory)


def _nearest_memory(sheets: Sequence[DataSheet], memory: float | None) -> DataSheet:
    return sheets[0] if memory is None else min(sheets, key=lambda sheet: abs(sheet.memory * GIB - memory))
