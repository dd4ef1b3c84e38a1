"""NF4 by the definition of the QLoRA paper (arXiv 2305.14314, appendix E), in NumPy, and bases of its values."""

import re
import shutil
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from safetensors.torch import load_file, save_file

QUANTIZED = re.compile(r"\.(layers|h)\.\d+\..*(proj|dense|query_key_value|dense_\w+|c_attn|c_proj|c_fc)\.weight$")
"""The names of the linear layers of a Llama's, a GPT-NeoX's and a GPT-2's decoder layers."""


def normal_values() -> list[float]:
    """The 16 values: quantiles of the normal distribution, 8 of each side, with 0, divided by the largest. 0.9677083 is
    the mean of 1 - 1/30 and 1 - 1/32, where the two halves with 15 and 16 quantiles would end.
    """
    quantile, offset = NormalDist().inv_cdf, (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    return sorted(value / max(above) for value in [*above, 0.0, *below])


def plain_nf4(weight: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (R, C), scales (R, blocks) and dequantized weights (R, C) of a float32 matrix, weight by weight."""
    rows, columns = weight.shape
    codes, found = np.zeros((rows, columns), np.uint8), np.zeros((rows, columns), np.float32)
    scales = np.zeros((rows, -(-columns // 64)), np.float32)
    for row in range(rows):
        for block, begin in enumerate(range(0, columns, 64)):
            part = weight[row, begin : begin + 64]
            scale = np.abs(part).max()
            for column, number in enumerate(part, start=begin):
                distances = np.abs(float(number) / float(scale or 1) - values.astype(np.float64))
                codes[row, column] = distances.argmin()
                found[row, column] = values[codes[row, column]] * scale
            scales[row, block] = scale
    return codes, scales, found


def dequantized_base(base: Path, out: Path, values: np.ndarray) -> Path:
    """A copy of a model folder whose linear layers have the values that NF4 gives back."""
    shutil.copytree(base, out)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if QUANTIZED.search(name):
            tensors[name] = torch.from_numpy(plain_nf4(tensor.numpy(), values)[2])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out
