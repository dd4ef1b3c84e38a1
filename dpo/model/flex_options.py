"""FlexAttention's kernel options by architecture and head size, and the origin of each value.

torch's defaults are tile sizes that were tuned for some architectures and head sizes; for others they spill registers
to memory (https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/template_heuristics/triton.py). An entry of
this table spills less than the default and stays within the architecture's shared memory: 166,912 bytes per block on
sm_80, 232,448 on sm_90 and sm_100
(https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html).

The bytes spilled per thread, default -> here, with the shared memory in brackets, of kernels for symbolic lengths,
bfloat16, 32 heads of queries and 8 of keys. They were read from the machine code that torch 2.13.0+cu130 and Triton
3.7.1 generate for `attention.block_attention`. It was compiled without a GPU: speed was not measured.

    width               sm_80                    sm_90                    sm_100
     64      forward       40 -> 0   (49,152)     672 -> 0  (114,688)      840 -> 0  (118,304)
             backward     256 -> 176 (38,144)       8: torch's own         704 -> 0   (66,880)
     80, 96  backward     688 -> 0   (70,912)     360 -> 8   (99,840)     1560 -> 0  (132,672)
    128      backward     656 -> 0   (70,912)     344 -> 8   (99,840)    13232 -> 0  (132,672)
    192      forward      192: torch's own          0: torch's own         448 -> 96 (198,688)
             backward   11208 -> 224 (103,040)   1952 -> 200 (131,712)     360 -> 176 (98,312)
    256      backward   11168 -> 224 (103,040)   2008 -> 200 (131,712)   13288 -> 176 (98,312)

Among tiles that spill next to nothing the table has the largest: smaller tiles read keys and values more often.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch.nn.attention.flex_attention import FlexKernelOptions

Options = Mapping[str, bool | int]
"""Options by their names in torch's FlexKernelOptions, after `fwd_` or `bwd_` where they are for one of the kernels."""

ALWAYS: Options = {"ROWS_GUARANTEED_SAFE": True}
"""Every query of a packed row sees itself, also in padding, so that no row of the softmax is empty."""


@dataclass(frozen=True)
class Row:
    """The options for a range of head sizes on one architecture, for dtypes of two bytes."""

    capability: tuple[int, int]
    """(major, minor): (9, 0) is sm_90."""
    widths: range
    """Head sizes, in elements."""
    options: Options


def _backward(queries: int, keys: int, stages: int) -> dict[str, int]:
    """Returns the tile sizes of both loops of the backward kernel, over queries (1) and over keys (2), on 8 warps."""
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
    """Returns FlexAttention's kernel options for a head size and dtype on a GPU of an architecture.

    Options that the installed torch does not know are left out. Options change the speed, not the result.

    Args:
        width: the head size, in elements.
        itemsize: bytes per element of the queries.
        capability: the compute capability of the GPU, (major, minor): (9, 0) is sm_90.

    Returns:
        Options by their names in torch's FlexKernelOptions.
    """
    chosen = dict(ALWAYS)
    for row in TABLE:
        if itemsize == 2 and row.capability == capability and row.widths.start <= width < row.widths.stop:
            chosen |= row.options
    return {name: value for name, value in chosen.items() if name.removeprefix("fwd_").removeprefix("bwd_") in _KNOWN}


_KNOWN = frozenset(FlexKernelOptions.__annotations__)
