"""The bytes of a step's collectives, counted on real processes, against the formula."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from dpo.adapters.choice import find_adapters
from dpo.adapters.inject import trained
from dpo.adapters.start import start_adapters
from dpo.batch.costs import CostModel
from dpo.batch.packing import pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.config import Config, DataConfig, LoraConfig, ModelConfig, OptimConfig, ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import make_mesh
from dpo.estimate.parameters import groups_of, trained_of
from dpo.estimate.traffic import Groups, parameter_groups, step_traffic
from dpo.model.build import build_policy, load_weights
from dpo.model.model_config import read_model_config
from dpo.model.parallelize import decoder_layers
from dpo.step.metrics import MAXIMA, SUMS
from dpo.step.optim import make_optimizer
from dpo.step.update import train_step
from tests.layouts.test_parallel import make_pairs, reference
from tests.support.collectives import CollectiveBytes
from tests.support.models import family_config, save_model
from tests.support.ranks import Ranks
from tests.support.runs import make_config

pytestmark = pytest.mark.xdist_group("ranks")


def counted_and_expected(folder: Path, keys: dict[str, Any], budget: int) -> tuple[dict[str, int], dict[str, int]]:
    """The bytes of the second of two training steps by kind, as sent and by formula, and its micro-batches."""
    keys = {"activation_checkpointing": "none", "sync_gradients": "last_micro_batch"} | keys
    lora = LoraConfig(**keys.pop("lora", {}))
    parallel = ParallelConfig(**keys)
    with open_world(60) as world:
        config = Config(model=ModelConfig(path=""), data=DataConfig(train=[]), parallel=parallel, lora=lora)
        model_config, mesh = read_model_config(folder, False), make_mesh(world, parallel)
        policy = build_policy(model_config, parallel, "float32", mesh, adapters=find_adapters(config))
        shard = world.size // parallel.replicate
        groups = parameter_groups(policy.model, decoder_layers(policy.model), shard)
        assert sum(p.numel() for p in trained(policy.model.parameters())) <= groups.num_reduced
        groups = replace(groups, trained=trained_of(config, model_config))
        load_weights(policy, folder)
        if policy.adapters:
            start_adapters(policy.model, 0)
        optimizer = make_optimizer(trained(policy.model.parameters()), OptimConfig(lr=1e-3))
        plan = plan_step(grow_trees(make_pairs()), world.size, budget, CostModel())
        for _ in range(2):
            batches = [pack(trees, plan, reference, policy.row_format) for trees in plan.micro_batches[world.lane]]
            with CollectiveBytes() as sent:
                train_step(policy, optimizer, batches, config, 1e-3, lambda: False)
        itemsize = getattr(torch, keys.get("compute_dtype", "float32")).itemsize
        traffic = vars(step_traffic(groups, shard, len(batches), parallel, itemsize))
        exchange = 8 * world.size * (len(SUMS) + len(MAXIMA))  # one float64 of each from every rank
        # The metrics are gathered into views of one tensor, another call than FSDP2's.
        expected = traffic | {"allgather_": exchange, "micro_batches": plan.num_micro_batches}
        return dict(sent.bytes) | {"micro_batches": len(batches)}, {k: v for k, v in expected.items() if v}


MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "defaults": (2, {}),
    "three ranks, which do not divide the shapes": (3, {}),
    "parameters kept": (2, {"reshard_after_forward": False}),
    "gradients on every micro-batch": (2, {"sync_gradients": "every_micro_batch"}),
    "parameters kept, gradients on every micro-batch": (
        2,
        {"reshard_after_forward": False, "sync_gradients": "every_micro_batch"},
    ),
    "checkpointed": (2, {"activation_checkpointing": "full"}),
    "gathered in bfloat16, reduced in float32": (2, {"compute_dtype": "bfloat16"}),
    "reduced in bfloat16": (2, {"reduce_dtype": "bfloat16"}),
    "two copies of two": (4, {"replicate": 2}),
    "two copies, every micro-batch": (4, {"replicate": 2, "sync_gradients": "every_micro_batch"}),
    "adapters": (2, {"lora": {"rank": 4}}),
    "adapters on three ranks": (3, {"lora": {"rank": 4}}),
    "adapters on every micro-batch, the base in bfloat16": (
        2,
        {"lora": {"rank": 4}, "sync_gradients": "every_micro_batch", "compute_dtype": "bfloat16"},
    ),
    "adapters, parameters kept": (2, {"lora": {"rank": 4}, "reshard_after_forward": False}),
    "adapters on a quantized base": (3, {"lora": {"rank": 4, "quantize": "nf4"}}),
    "adapters on a quantized base, in bfloat16": (
        2,
        {"lora": {"rank": 4, "quantize": "nf4"}, "compute_dtype": "bfloat16"},
    ),
    "adapters, checkpointed": (2, {"lora": {"rank": 4}, "activation_checkpointing": "full"}),
    "adapters and embeddings": (3, {"lora": {"rank": 4, "train_embeddings": True}}),
    "adapters in the last layer": (2, {"lora": {"rank": 4, "target_modules": r".*\.1\.mlp\..*"}}),
    "adapters in the last layer, every micro-batch": (
        2,
        {"lora": {"rank": 4, "target_modules": r".*\.1\.mlp\..*"}, "sync_gradients": "every_micro_batch"},
    ),
    "adapters with magnitudes": (2, {"lora": {"rank": 4, "dora": True}}),
    "two copies, adapters": (4, {"lora": {"rank": 4}, "replicate": 2}),
    "two copies, adapters on every micro-batch": (
        4,
        {"lora": {"rank": 4}, "replicate": 2, "sync_gradients": "every_micro_batch"},
    ),
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A model with an untied head and one with a tied one; 97 tokens are divided by no number of ranks."""
    return save_model(tmp_path_factory.mktemp("traffic"), request.param)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_sends_what_the_formula_says(folder: Path, ranks: Ranks, mode: str) -> None:
    """To the byte, on every rank, with several micro-batches; nothing else is sent."""
    size, keys = MODES[mode]
    for counted, expected in ranks(size, counted_and_expected, folder, keys, 40):
        assert counted["micro_batches"] >= 2
        assert counted == expected


@pytest.mark.parametrize("sync_gradients", ["last_micro_batch", "every_micro_batch"])
def test_layers_without_a_backward_pass_are_gathered_once(tmp_path: Path, ranks: Ranks, sync_gradients: str) -> None:
    """Of five layers the upper two have adapters."""
    config = family_config("llama")
    config.num_hidden_layers = 5
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    lora = {"rank": 4, "target_modules": r".*\.[34]\.self_attn\..*"}
    for counted, expected in ranks(
        2, counted_and_expected, tmp_path, {"lora": lora, "sync_gradients": sync_gradients}, 40
    ):
        assert counted == expected


def test_the_adapters_are_what_is_reduced(folder: Path) -> None:
    """By hand, on one rank: of rank r, an adapter of a product of n inputs and m outputs has r (n + m) elements. The
    Llama has hidden size 32, an MLP of 48, 2 of 4 heads of 8 for keys and values; GPT-2 hidden size 32.
    """
    config = make_config("m", "d", "r", lora__rank=4)
    groups = groups_of(config, read_model_config(folder, False), 1)
    of_llama = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    of_gpt2 = 4 * ((32 + 96) + (32 + 32) + 2 * (32 + 128))
    assert groups.reduced in (Groups((of_llama,) * 2, 0), Groups((of_gpt2,) * 2, 0))


def test_the_leanest_mode_does_not_grow_with_the_micro_batches(folder: Path, ranks: Ranks) -> None:
    """Parameters kept, gradients reduced once: one gather and one reduction of everything, whatever the budget."""
    keys = {"reshard_after_forward": False}
    few, many = (ranks(2, counted_and_expected, folder, keys, budget)[0][0] for budget in (10_000, 40))
    assert few.pop("micro_batches") == 1 < many.pop("micro_batches")
    assert few == many
