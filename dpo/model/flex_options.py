"""FlexAttention's kernel options by architecture and head size: the one table, and where its values are from.

torch's own defaults are tiles that were tuned for speed where they were tuned, and spill registers to memory elsewhere
(https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/template_heuristics/triton.py). A row stands in this
table only where it spills less than the default and stays within the architecture's shared memory: 166,912 bytes a
block on sm_80, 232,448 on sm_90 and sm_100
(https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html). Bytes spilled a thread,
default -> here, and shared memory in brackets, of kernels for any length, bfloat16, 32 heads of queries and 8 of keys,
read from the machine code that torch 2.13.0+cu130 and Triton 3.7.1 make of `attention.block_attention`. It was compiled
on a CUDA that computes nothing: speed was not measured.

    width               sm_80                    sm_90                    sm_100
     64      forward       40 -> 0   (49,152)     672 -> 0  (114,688)      840 -> 0  (118,304)
             backward     256 -> 176 (38,144)       8: torch's own         704 -> 0   (66,880)
     80, 96  backward     688 -> 0   (70,912)     360 -> 8   (99,840)     1560 -> 0  (132,672)
    128      backward     656 -> 0   (70,912)     344 -> 8   (99,840)    13232 -> 0  (132,672)
    192      forward      192: torch's own          0: torch's own         448 -> 96 (198,688)
             backward   11208 -> 224 (103,040)   1952 -> 200 (131,712)     360 -> 176 (98,312)
    256      backward   11168 -> 224 (103,040)   2008 -> 200 (131,712)   13288 -> 176 (98,312)

Of several that spill next to nothing the largest tile stands here: a smaller one reads keys and values more often.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch.nn.attention.flex_attention import FlexKernelOptions

Options = Mapping[str, bool | int]
"""Names as in torch's FlexKernelOptions, with `fwd_` or `bwd_` before those of one kernel."""

ALWAYS: Options = {"ROWS_GUARANTEED_SAFE": True}
"""Every query of a packed row sees itself, padding too, so no row of the softmax is empty."""


@dataclass(frozen=True)
class Row:
    """Options for a range of head sizes on one architecture, for dtypes of two bytes."""

    capability: tuple[int, int]
    """(major, minor): (9, 0) is sm_90."""
    widths: range
    """Head sizes, in numbers."""
    options: Options


def _backward(queries: int, keys: int, stages: int) -> dict[str, int]:
    """The tiles of both loops of the backward kernel, over queries (1) and over keys (2), on 8 warps."""
    tiles = {"bwd_BLOCK_M1": queries, "bwd_BLOCK_N1": keys, "bwd_BLOCK_M2": keys, "bwd_BLOCK_N2": queries}
    return tiles | {"bwd_num_stages": stages, "bwd_num_warps": 8}


_FORWARD_ON_EIGHT_WARPS = {"fwd_num_warps": 8}
_FORWARD_192 = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 2, "fwd_num_warps": 8}
_SM_80, _SM_90, _SM_100 = (8, 0), (9, 0), (10, 0)

TABLE = (
    Row(_SM_80, range(64, 65), _FORWARD_ON_EIGHT_WARPS | _backward(64, 64, stages=2)),
    Row(_SM_80, range(65, 129), _backward(64, 64, stages=2)),
    Row(_SM_80, range(129, 257), _backward(32, 64, stages=2)),
    Row(_SM_90, range(64, 65), _FORWARD_ON_EIGHT_WARPS),
    Row(_SM_90, range(65, 129), _backward(64, 64, stages=2)),
    Row(_SM_90, range(129, 257), _backward(32, 64, stages=2)),
    Row(_SM_100, range(64, 65), _FORWARD_ON_EIGHT_WARPS | _backward(32, 128, stages=3)),
    Row(_SM_100, range(65, 129), _backward(64, 64, stages=2)),
    Row(_SM_100, range(129, 193), _FORWARD_192 | _backward(32, 64, stages=1)),
    Row(_SM_100, range(193, 257), _backward(32, 64, stages=1)),
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
