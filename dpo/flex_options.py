"""FlexAttention's kernel options by architecture and head size: the one table, and where its values are from.

torch's own defaults are tiles that were tuned for speed where they were tuned, and spill registers to memory elsewhere
(https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/template_heuristics/triton.py). A row stands in this
table only where it spills less than the default and stays within the architecture's shared memory. Bytes spilled a
thread, default -> here, bfloat16, 32 heads of queries and 8 of keys, length unknown to the kernel, compiled by torch
2.13 and Triton 3.7; the shared memory of a block in brackets. Speed was not measured: no GPU was at hand.

    sm_90   forward    width 64         672 -> 0    (114,688 of 232,448 bytes)
            backward   width 128        344 -> 8    (115,968)
                       width 80, 96     360 -> 24   (115,968)
                       width 192       1952 -> 200  (131,712)
                       width 256       2008 -> 200  (131,712)

Of several that spill next to nothing the largest tile stands here: a smaller one reads keys and values more often.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch.nn.attention.flex_attention import FlexKernelOptions

Options = Mapping[str, bool | int]
"""Names as in torch's FlexKernelOptions, with `fwd_` or `bwd_` before those of one kernel."""

ALWAYS: Options = MappingProxyType({"ROWS_GUARANTEED_SAFE": True})
"""Every query of a packed row sees itself, padding too, so no row of the softmax is empty."""


@dataclass(frozen=True)
class Row:
    """Options for a range of head sizes on one architecture, for dtypes of two bytes."""

    capability: tuple[int, int]
    """(major, minor): (9, 0) is sm_90."""
    widths: range
    """Head sizes, in numbers."""
    options: Options


def _backward_tiles(queries: int, keys: int, warps: int) -> dict[str, int]:
    """The tiles of both loops of the backward kernel: over queries (1) and over keys (2)."""
    tiles = {"bwd_BLOCK_M1": queries, "bwd_BLOCK_N1": keys, "bwd_BLOCK_M2": keys, "bwd_BLOCK_N2": queries}
    return tiles | {"bwd_num_warps": warps}


TABLE = (
    Row((9, 0), range(64, 65), MappingProxyType({"fwd_num_warps": 8})),
    Row((9, 0), range(65, 129), MappingProxyType(_backward_tiles(32, 128, warps=8))),
    Row((9, 0), range(129, 257), MappingProxyType(_backward_tiles(32, 64, warps=8))),
)


def flex_options(width: int, itemsize: int, capability: tuple[int, int]) -> dict[str, bool | int]:
    """The kernel options for heads of `width` numbers of `itemsize` bytes on a GPU; no name that this torch's
    FlexAttention does not know. They change speed, not what is computed.
    """
    chosen = dict(ALWAYS)
    for row in TABLE:
        if itemsize == 2 and row.capability == capability and row.widths.start <= width < row.widths.stop:
            chosen |= row.options
    return {name: value for name, value in chosen.items() if name.removeprefix("fwd_").removeprefix("bwd_") in _KNOWN}


_KNOWN = frozenset(FlexKernelOptions.__annotations__)
