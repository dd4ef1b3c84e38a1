"""NF4: weights of four bits, as bitsandbytes computes them without double quantization (QLoRA, arXiv 2305.14314).

A row is divided into blocks of 64 weights. Of each block its largest magnitude is kept in float32, the scale, and of
each weight the number of the value in VALUES, 0 to 15, that is nearest to weight / scale; of two that are equally near
the lower. Values and method: the paper's appendix E, and NormalFloat in
https://github.com/bitsandbytes-foundation/bitsandbytes (`quantize_4bit`, `compress_statistics=False`, `blocksize=64`),
whose blocks are these where the length of rows divides by 64. Here no block reaches into another row: rows that are
quantized on different ranks are the rows of the whole matrix quantized.

A row of the two weights 0.5 and -0.1, padded with 62 zeros to a block:

    scale       0.5
    / scale     1.0, -0.2, 0, 0, ...
    nearest     1.0, -0.1847734, 0, 0, ...
    codes       15, 5, 7, 7, ...
    bytes       0xF5 and 31 times 0x77, the earlier weight in the upper half; then 00 00 00 3F, the scale
    weights     0.5, -0.0923867

A row of bytes has those of the codes of all blocks first, then those of all scales.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
"""Weights that have one scale."""
CODE_BYTES, SCALE_BYTES = BLOCK // 2, 4
"""The bytes of the codes of a block, and of its scale: 0.5625 bytes per weight."""
VALUES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
_MIDDLES = (VALUES[1:] + VALUES[:-1]) / 2
PAIRS = torch.stack([VALUES.repeat_interleave(16), VALUES.repeat(16)], dim=-1)
"""The two values of each byte, (256, 2)."""
_LEAST = 1e-38
"""A block of smaller weights, which has no finite 1 / scale, is divided by this: its weights are all but 0."""
_AT_ONCE = 2**22
"""Weights that are quantized at a time, which bounds the memory that it takes."""


def num_bytes(columns: int) -> int:
    """Returns the bytes of a row of `columns` weights."""
    return _num_blocks(columns) * (CODE_BYTES + SCALE_BYTES)


def _num_blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def quantize(rows: Tensor, out: Tensor) -> None:
    """Fills the first num_bytes(C) bytes of the rows of `out`, uint8, with rows (R, C), which are converted to float32
    first.
    """
    step = max(1, _AT_ONCE // max(1, rows.shape[1]))
    for begin in range(0, len(rows), step):
        out[begin : begin + step, : num_bytes(rows.shape[1])] = _quantized(rows[begin : begin + step])


def _quantized(rows: Tensor) -> Tensor:
    blocks = _num_blocks(rows.shape[1])
    padded = pad(rows.float(), (0, blocks * BLOCK - rows.shape[1])).view(len(rows), blocks, BLOCK)
    scale = padded.abs().amax(dim=-1)
    # Times 1 / scale, not divided by it, as bitsandbytes does: the two may round to different sides of a middle.
    relative = (padded * (1.0 / scale.clamp(min=_LEAST))[..., None]).clamp(-1, 1)
    codes = torch.bucketize(relative, _MIDDLES, out_int32=True).to(torch.uint8).view(len(rows), -1)
    return torch.cat([codes[:, ::2] << 4 | codes[:, 1::2], scale.view(torch.uint8).view(len(rows), -1)], dim=1)


def dequantize(packed: Tensor, columns: int, dtype: torch.dtype, pairs: Tensor = PAIRS) -> Tensor:
    """Returns the weights (R, columns): each one float32 product, rounded to `dtype`; the same on any device.

    Args:
        packed: (R, num_bytes(columns) or more), uint8.
        columns: the weights of a row.
        dtype: of the result.
        pairs: PAIRS; on the device of `packed`, so that the host does not wait until it is copied there.
    """
    blocks = _num_blocks(columns)
    codes, scale = packed[:, : num_bytes(columns)].split([blocks * CODE_BYTES, blocks * SCALE_BYTES], dim=1)
    values = pairs.to(packed.device)[codes.int()].view(len(packed), blocks, BLOCK)
    values = values.mul_(scale.contiguous().view(torch.float32)[..., None])
    return values.view(len(packed), -1)[:, :columns].to(dtype).contiguous()
