"""Where a test of this folder runs: on CUDA, and on machines without it once more, emulated on the CPU."""

from collections.abc import Iterator

import pytest
import torch

from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World
from tests.gpu.emulation import emulated

CUDA_ALONE = pytest.mark.cuda_alone
"""Marks a case that differs from another one on CUDA, but not where it is emulated."""
NO_GPU = "needs a GPU: make test-gpu"


@pytest.fixture(params=["cuda", "emulated"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device that `open_world` chooses; nothing is compiled yet."""
    torch.compiler.reset()
    if request.param == "cuda":
        yield request.getfixturevalue("cuda")
    elif torch.cuda.is_available():
        pytest.skip("runs on the GPU")
    elif request.node.get_closest_marker("cuda_alone"):
        pytest.skip("another case shows it on a CPU")
    else:
        with emulated():
            yield torch.device("cpu")
    torch.compiler.reset()


@pytest.fixture
def cuda() -> torch.device:
    """For what only a GPU shows."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return torch.device("cuda", 0)


@pytest.fixture
def world(device: torch.device) -> Iterator[World]:
    """A group of one."""
    with open_world(60) as world:
        assert world.device.type == device.type
        start_devices(world, 60)
        yield world
