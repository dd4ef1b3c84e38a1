"""What the host does for a GPU, on stub CUDA libraries without computation (idle_cuda.c): `make test-cuda-host`.

A run goes its CUDA path to the end; a step waits once and sends the bytes of the formula. No value is looked at: device
memory reads as zeros.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo.batch.costs import CostModel
from dpo.batch.packing import pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.config import Config, LossConfig, OptimConfig, ParallelConfig
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import make_mesh
from dpo.estimate.traffic import parameter_groups, step_traffic
from dpo.model.build import build_policy
from dpo.model.model_config import read_model_config
from dpo.model.parallelize import decoder_layers
from dpo.run_folder.files import FINAL
from dpo.step.metrics import MAXIMA, SUMS
from dpo.step.optim import make_optimizer
from dpo.step.update import train_step
from tests.gpu import idle_cuda
from tests.layouts.test_parallel import make_pairs, reference
from tests.support.models import save_model
from tests.support.ranks import Ranks
from tests.support.runs import changed, eval_lines, run, save_six_steps, six_steps, train_lines

pytestmark = pytest.mark.xdist_group("idle-cuda")


class Counts(ctypes.Structure):
    """`idle_counts` of idle_cuda.c."""

    _fields_ = [(name, ctypes.c_ulong) for name in ("launches", "waits", "all_gather", "reduce_scatter", "all_reduce")]


@pytest.fixture(scope="module")
def idle_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with idle_cuda.idle_ranks(tmp_path_factory.mktemp("idle") / "cuda") as ranks:
        yield ranks


def run_on_cuda(config: Config) -> None:
    """`run`, where there is a GPU."""
    assert torch.cuda.is_available()
    run(config)


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_goes_its_way_on_cuda(size: int, idle_ranks: Ranks, tmp_path: Path) -> None:
    """Reference pass, first step's check, six steps in bfloat16 through FlexAttention's kernels, evaluations,
    checkpoints through pinned memory, export. Without answers: Hugging Face ends them at a value that is read from the
    device.
    """
    # Losses read as zeros, too, which the first step's check finds wrong.
    config = changed(six_steps(save_six_steps(tmp_path), tmp_path / "run"), reference__first_step_check="warn")
    idle_ranks(size, run_on_cuda, config)
    assert len(train_lines(tmp_path / "run")) == 6
    assert len(eval_lines(tmp_path / "run")) == 3
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
    assert (tmp_path / "run" / FINAL / "model.safetensors").is_file()


def counted_and_expected(folder: Path, keys: dict[str, Any]) -> tuple[dict[str, int], dict[str, int], int]:
    """What the third of three steps did, what it should have done, and its micro-batches."""
    parallel = ParallelConfig(**{"activation_checkpointing": "none", "sync_gradients": "last_micro_batch"} | keys)
    with open_world(60) as world:
        start_devices(world, 60)
        policy = build_policy(read_model_config(folder, False), parallel, "float32", make_mesh(world, parallel))
        shard = world.size // parallel.replicate
        groups = parameter_groups(policy.model, decoder_layers(policy.model), shard)
        optimizer = make_optimizer(policy.model.parameters(), OptimConfig(lr=1e-3))
        config = Config(model=None, data=None, parallel=parallel, loss=LossConfig())  # type: ignore[arg-type]
        plan = plan_step(grow_trees(make_pairs()), world.size, 40, CostModel())
        counts = Counts.in_dll(ctypes.CDLL(None), "idle_counts")
        for _ in range(3):
            batches = [pack(trees, plan, reference, policy.row_format) for trees in plan.micro_batches[world.lane]]
            ctypes.memset(ctypes.byref(counts), 0, ctypes.sizeof(counts))
            train_step(policy, optimizer, batches, config, 1e-3, lambda: False)
        found = {name: getattr(counts, name) for name, _ in Counts._fields_}
        traffic = step_traffic(groups, shard, len(batches), parallel, 2)
        expected = {
            "all_gather": traffic.all_gather // shard + 8 * (len(SUMS) + len(MAXIMA)),  # a float64 of each metric
            "reduce_scatter": traffic.reduce_scatter // shard,
            "all_reduce": traffic.all_reduce,
            "waits": 1,
        }
        return found, expected, len(batches)


MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "sharded": (2, {}),
    "parameters kept": (2, {"reshard_after_forward": False}),
    "gradients on every micro-batch": (2, {"sync_gradients": "every_micro_batch"}),
    "two copies of two": (4, {"replicate": 2}),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_waits_once_and_sends_what_the_formula_says(mode: str, idle_ranks: Ranks, tmp_path: Path) -> None:
    """NCCL is given the formula's bytes, on every rank; the host waits for the metrics alone."""
    size, keys = MODES[mode]
    folder = save_model(tmp_path, "llama")
    for found, expected, num_micro_batches in idle_ranks(size, counted_and_expected, folder, keys):
        assert num_micro_batches >= 2
        assert found["launches"] > 100
        assert {name: found[name] for name in expected} == expected
