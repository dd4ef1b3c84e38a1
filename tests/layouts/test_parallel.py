"""Every key of `parallel`, on 2 or 4 real processes, against the gradient of the plain model in one process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo.base.errors import UserError
from dpo.batch.costs import CostModel
from dpo.batch.packing import RowFormat, pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.config import LossConfig, ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from dpo.model.build import build_policy, load_weights
from dpo.model.model_config import read_model_config
from dpo.model.policy import announce_backward, completion_logps
from dpo.pairs.pair_set import Pair
from dpo.step.objective import pair_losses
from tests.support.models import VOCAB, plain_logp, plain_model, save_model
from tests.support.ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")


def make_pairs(num_prompts: int = 6) -> list[Pair]:
    """Two pairs a prompt that share the winner."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, VOCAB, length).astype(np.int32)

    pairs = []
    for _ in range(num_prompts):
        prompt, winner = ids(rng.integers(3, 20)), ids(rng.integers(2, 12))
        pairs += [Pair(prompt, winner, ids(rng.integers(2, 12))) for _ in range(2)]
    return pairs


def reference(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> float:
    """An invented reference log-probability, so that the pairs' margins differ: -4 nats a token."""
    return -4.0 * len(completion_ids)


def plain_gradients(model_folder: Path) -> dict[str, Tensor]:
    """The gradient of the mean DPO loss, each completion alone through the plain model."""
    model = plain_model(model_folder)
    pairs, losses = make_pairs(), []
    for pair in pairs:
        pi = torch.stack([plain_logp(model, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)])
        ref = torch.tensor([reference(pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)])
        winner, loser = pi - ref
        losses.append(torch.log1p(torch.exp(-0.1 * (winner - loser))))  # -log sigmoid(0.1 h)
    (torch.stack(losses).sum() / len(pairs)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sharded_gradients(model_folder: Path, parallel: ParallelConfig, budget: int) -> dict[str, np.ndarray]:
    """The same gradient from a sharded policy, whole, on every rank."""
    with open_world(60) as world:
        policy = build_policy(read_model_config(model_folder, False), parallel, "float32", make_mesh(world, parallel))
        load_weights(policy, model_folder)
        plan = plan_step(grow_trees(make_pairs()), world.size, budget, CostModel())
        micro_batches = plan.micro_batches[world.rank]
        for number, trees in enumerate(micro_batches, start=1):
            batch = pack(trees, plan, reference, RowFormat(policy.windows, world.device))
            announce_backward(policy, number == len(micro_batches))
            losses, _ = pair_losses(completion_logps(policy, batch), batch, LossConfig())
            (losses.sum() / batch.pairs_in_step).backward()
        return {name: p.grad.full_tensor().numpy() for name, p in policy.model.named_parameters()}


OPTIONS: dict[str, tuple[int, dict[str, Any], float]] = {
    "sharded over 2": (2, {}, 1e-5),
    "replicated 2 x sharded 2": (4, {"replicate": 2, "shard": 2}, 1e-5),
    "replicated only": (2, {"replicate": 2, "shard": 1}, 1e-5),
    "gradients reduced on every micro-batch": (2, {"sync_gradients": "every_micro_batch"}, 1e-5),
    "every micro-batch, replicated": (4, {"sync_gradients": "every_micro_batch", "replicate": 2}, 1e-5),
    "parameters kept after forward": (2, {"reshard_after_forward": False}, 1e-5),
    "full checkpointing": (2, {"activation_checkpointing": "full"}, 1e-5),
    "selective checkpointing": (2, {"activation_checkpointing": "selective"}, 1e-5),
    "offloaded to the CPU": (2, {"cpu_offload": True}, 1e-5),
    "compiled": (2, {"compile": True}, 1e-5),
    # bfloat16 keeps 8 bits: each rounding is up to 2^-9 = 0.002 relative, and some hundred of them add up at random.
    "computed in bfloat16": (2, {"compute_dtype": "bfloat16"}, 0.05),
    "reduced in bfloat16": (2, {"reduce_dtype": "bfloat16"}, 0.01),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama-tied")


@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_is_that_of_the_plain_model(ranks: Ranks, folder: Path, name: str) -> None:
    """Every parameter tensor: |g - g*| <= tol |g*|. Few tokens a micro-batch, so that gradients are accumulated; but
    one micro-batch where its shapes are compiled, which takes half a minute each time."""
    size, keys, tolerance = OPTIONS[name]
    budget = 10_000 if keys.get("compile") else 60
    expected = plain_gradients(folder)
    for found in ranks(
        size, sharded_gradients, folder, ParallelConfig(**({"sync_gradients": "last_micro_batch"} | keys)), budget
    ):
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            error = np.linalg.norm(found[parameter] - gradient.numpy()) / gradient.norm().item()
            assert error <= tolerance, (parameter, error)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"replicate": 3}, "parallel.replicate: 3 replicas do not divide 8 ranks evenly; valid: 1, 2, 4, 8"),
        (
            {"replicate": 2, "shard": 3},
            "parallel.shard: replicate 2 x shard 3 is not the number of ranks 8; valid: rep",
        ),
        (
            {"shard": 4},
            "parallel.shard: replicate 1 x shard 4 is not the number of ranks 8; valid: replicate * shard = 8",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_the_ranks_is_refused(keys: dict[str, int], message: str) -> None:
    """At the key that was set."""
    world = World(0, 8, 0, 8, torch.device("cpu"))
    with pytest.raises(UserError) as failure:
        make_mesh(world, ParallelConfig(**keys))  # type: ignore[arg-type]
    assert str(failure.value).startswith(message)
