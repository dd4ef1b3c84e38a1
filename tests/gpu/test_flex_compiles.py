"""FlexAttention's kernels compiled for the architectures of dpo/model/flex_options.py, without a GPU.

Run by `make test-cuda-host`.

What ptxas made says by itself what it spills, and what shared memory it wants.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dpo.batch.block_mask import Span, host_mask
from dpo.model.attention import block_attention
from dpo.model.flex_options import TABLE
from dpo.model.warm_up import LENGTHS, first_length_unknown
from tests.gpu import idle_cuda
from tests.support.ranks import Ranks

pytestmark = pytest.mark.xdist_group("idle-cuda")

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes that a block may have, by compute capability: CUDA Programming Guide, compute capabilities."""

SPILLED_BY_DEFAULT = {
    80: {64: (40, 256), 128: (0, 656), 256: (0, 11168)},
    90: {64: (672, 8), 128: (0, 344), 256: (0, 2008)},
    100: {64: (840, 704), 128: (0, 13232), 192: (448, 360), 256: (8, 13288)},
}
"""Compute capability -> head size -> bytes a thread that forward and backward spill with torch 2.13's own options."""


@pytest.fixture(scope="module", params=sorted(SHARED_MEMORY), ids=lambda capability: f"sm_{capability}")
def architecture(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, Ranks]]:
    """A compute capability, and a process that sees a GPU of it."""
    folder = tmp_path_factory.mktemp("idle") / "cuda"
    with idle_cuda.idle_ranks(folder, IDLE_CUDA_CAPABILITY=str(request.param)) as ranks:
        yield request.param, ranks


def compile_heads(width: int, folder: Path) -> tuple[int, int]:
    """Attention forward and backward, for rows of any length, compiled into `folder`; the GPU's compute capability."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    device, length = torch.device("cuda", 0), LENGTHS[0]
    mask = host_mask([Span(0, length, ())], None, pin=False).to(device)
    shapes = [(1, length, heads, width) for heads in (32, 8, 8)]
    rows = [torch.empty(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]
    with first_length_unknown():
        output = block_attention(*(row.requires_grad_() for row in rows), mask, None)
        output.sum().backward()
    return torch.cuda.get_device_capability(device)


def resources(folder: Path) -> dict[str, tuple[int, int]]:
    """Kernel -> (bytes it spills a thread, bytes of shared memory), of the two compiled into `folder`."""
    import triton

    found = {}
    for cubin in folder.rglob("triton_tem_*.cubin"):
        words = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        stack = re.search(r"STACK:(\d+)", usage)
        shared = re.search(r'"shared": (\d+)', cubin.with_suffix(".json").read_text())
        assert stack and shared
        found["backward" if "backward" in cubin.name else "forward"] = int(stack[1]), int(shared[1])
    return found


@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_options_of_the_table_compile(width: int, architecture: tuple[int, Ranks], tmp_path: Path) -> None:
    """Within the shared memory of a block; where the table names options for a kernel, they spill less than torch's."""
    number, ranks = architecture
    if width not in SPILLED_BY_DEFAULT[number]:
        pytest.skip("the width above has the same options")
    (capability,) = ranks(1, compile_heads, width, tmp_path)
    assert capability == divmod(number, 10)
    options = [row.options for row in TABLE if row.capability == capability and width in row.widths]
    found, by_default = resources(tmp_path), SPILLED_BY_DEFAULT[number][width]
    for kernel, prefix, default in zip(("forward", "backward"), ("fwd_", "bwd_"), by_default, strict=True):
        spilled, shared = found[kernel]
        assert shared <= SHARED_MEMORY[number]
        if any(name.startswith(prefix) for name in options[0]):
            assert spilled < default
