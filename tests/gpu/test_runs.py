"""Whole runs on CUDA: trained, interrupted, gone on with, and on two GPUs."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo.batch.costs import cost_model
from dpo.batch.packing import RowFormat, pack, padded_length
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.config import Config, LossConfig, ParallelConfig
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import make_mesh
from dpo.model.build import build_policy, load_weights
from dpo.model.model_config import read_model_config
from dpo.model.policy import announce_backward, completion_logps
from dpo.run_folder.files import FINAL
from dpo.step.objective import pair_losses
from tests.gpu.conftest import CUDA_ALONE
from tests.gpu.emulation import emulated
from tests.model.test_policy import BETA, oracle, ref_logp, some_pairs
from tests.support.data_fixtures import make_tokenizer
from tests.support.models import plain_logp, plain_model, save_model
from tests.support.processes import start
from tests.support.ranks import Ranks
from tests.support.runs import (
    eval_lines,
    reference_line,
    run,
    run_until,
    same_weights,
    save_six_steps,
    six_steps,
    train_lines,
    without_clock,
    worst_relative,
)

LEARNED = ["train/loss", "train/grad_norm", "train/logps/chosen", "train/logps/rejected"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer, so that answers are sampled."""
    root = save_six_steps(tmp_path_factory.mktemp("gpu-runs"))
    make_tokenizer().save_pretrained(root / "model")
    return root


def config_of(folders: Path, run_dir: Path, **changes: Any) -> Config:
    """Six steps in float32, with a reference cache of their own."""
    facts = {"parallel__compute_dtype": "float32", "reference__cache_dir": str(run_dir.parent / "cache")}
    return six_steps(folders, run_dir, **(facts | changes))


def run_on_cpu(config: Config) -> Path:
    """The same run in a process that sees no GPU."""
    process = start(without_gpu, config)
    process.join(240)
    process.kill()
    assert process.exitcode == 0
    return Path(str(config.train.run_dir))


def without_gpu(config: Config) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    run(config)


@pytest.mark.parametrize("optimizer", ["rmsprop", pytest.param("adamw", marks=CUDA_ALONE)])
def test_a_run_is_that_of_the_cpu(optimizer: str, folders: Path, device: torch.device, tmp_path: Path) -> None:
    """Reference pass, check of the first step, six updates at the paper's learning rate, evaluations with sampled
    answers, checkpoints, export: metrics within 1e-4 of the CPU's, and a model that loads.
    """
    changes = {"optim__name": optimizer, "optim__lr": 1e-6}
    here = run(config_of(folders, tmp_path / "here", **changes))
    there = run_on_cpu(config_of(folders, tmp_path / "there", **changes))
    assert worst_relative(train_lines(here), train_lines(there), LEARNED) <= 1e-4
    assert worst_relative(eval_lines(here), eval_lines(there), ["eval/loss", "eval/logps/chosen"]) <= 1e-4
    assert reference_line(here)[0] > 0
    assert len((here / "answers" / "step-000006.jsonl").read_text().splitlines()) > 0
    assert torch.isfinite(plain_logp(plain_model(here / FINAL), [1, 5, 6], [7, 2]))


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__compute_dtype": "auto"},
        {"parallel__cpu_offload": True},
        pytest.param(  # emulated, test_exactness compiles layers
            {"parallel__compile": True, "parallel__activation_checkpointing": "selective"}, marks=CUDA_ALONE
        ),
        pytest.param({"optim__name": "adamw"}, marks=CUDA_ALONE),
    ],
)
def test_an_interrupted_run_goes_on_bitwise(
    changes: dict[str, Any], folders: Path, device: torch.device, tmp_path: Path
) -> None:
    """Ended before step 4, gone on with from the checkpoint after step 2: the metrics and weights of a whole run."""
    changes = changes | {"train__steps": 4, "eval__samples": 0}
    whole = run(config_of(folders, tmp_path / "whole", **changes))
    cut = config_of(folders, tmp_path / "cut", **changes)
    run_until(cut, 4)
    resumed = run(cut)
    assert without_clock(train_lines(resumed)) == without_clock(train_lines(whole))
    assert same_weights(resumed / FINAL, whole / FINAL)


def test_bfloat16_learns(folders: Path, device: torch.device, tmp_path: Path) -> None:
    """What a user runs: `auto`. The first step's loss is ln 2 within bfloat16, the last one's is lower."""
    lines = train_lines(run(config_of(folders, tmp_path / "run", parallel__compute_dtype="bfloat16")))
    assert lines[0]["train/loss"] == pytest.approx(np.log(2), abs=0.1)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


# --- two GPUs --------------------------------------------------------------------------------------------------------


def gradients(folder: Path, parallel: ParallelConfig, budget: int) -> dict[str, np.ndarray]:
    """Of `tests.model.test_policy`'s pairs, whole, on every rank."""
    with nullcontext() if torch.cuda.is_available() else emulated(), open_world(60) as world:
        start_devices(world, 60)
        policy = build_policy(read_model_config(folder, False), parallel, "float32", make_mesh(world, parallel))
        load_weights(policy, folder)
        plan = plan_step(grow_trees(some_pairs()), world.size, budget, cost_model(policy.config))
        micro_batches = plan.micro_batches[world.rank]
        for number, trees in enumerate(micro_batches, start=1):
            batch = pack(trees, plan, ref_logp, RowFormat(policy.windows, world.device, row_length=padded_length))
            batch = batch.to(world.device)
            announce_backward(policy, number == len(micro_batches))
            losses, _ = pair_losses(completion_logps(policy, batch), batch, LossConfig(beta=BETA))
            (losses.sum() / batch.pairs_in_step).backward()
        return {name: p.grad.full_tensor().cpu().numpy() for name, p in policy.model.named_parameters()}


LAYOUTS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "replicated": {"replicate": 2, "shard": 1},
    "kept after forward": {"reshard_after_forward": False},
    "every micro-batch": {"sync_gradients": "every_micro_batch"},
    "on the host": {"cpu_offload": True},
}


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_sum_one_gradient(layout: str, device: torch.device, ranks: Ranks, tmp_path: Path) -> None:
    """NCCL's sums (gloo's, emulated): each gradient is that of plain Hugging Face on a CPU, on either rank."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: make test-gpu")
    folder = save_model(tmp_path, "llama")
    _, wanted = oracle(folder)
    parallel = ParallelConfig(**({"compute_dtype": "float32", "sync_gradients": "last_micro_batch"} | LAYOUTS[layout]))
    for found in ranks(2, gradients, folder, parallel, 1):
        errors = {name: np.linalg.norm(found[name] - g.numpy()) / g.norm().item() for name, g in wanted.items()}
        assert max(errors.values()) <= 1e-4, max(errors.items(), key=lambda item: item[1])
