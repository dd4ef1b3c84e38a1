"""What a step costs by formula against what is counted while it runs: FLOPs of a whole `train_step`, and tokens that
the body is given.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dpo.adapters.choice import find_adapters
from dpo.adapters.inject import trained
from dpo.batch.costs import UNGATED, ForwardFlops, Trained, cost_model, model_flops, step_flops, units
from dpo.batch.packer import Packer, make_packer
from dpo.batch.trees import Tree, grow_trees
from dpo.config import BatchConfig, Config, DataConfig, LoraConfig, ModelConfig, ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from dpo.estimate.parameters import trained_of
from dpo.machine.peaks import device_peak
from dpo.model.build import build_policy
from dpo.model.log_probs import recomputed_share
from dpo.model.parallelize import decoder_layers
from dpo.model.policy import Policy
from dpo.pairs.pair_set import Pair
from dpo.step.optim import make_optimizer
from dpo.step.update import train_step
from tests.bench.worlds import WORKLOADS

VOCAB, MIB = 3000, 2**20
aten = torch.ops.aten
_SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
_GROUPED = {"num_key_value_heads": 2, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SIZES | _GROUPED,
    "qwen3": _SIZES | _GROUPED | {"head_dim": 32},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_neox": _SIZES | {"tie_word_embeddings": False},
}
"""Grouped queries in two of them, heads wider than the hidden size in one, tied weights in one."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


NO_LORA = LoraConfig()


def make_config(parallel: ParallelConfig, tokens_per_micro_batch: int, lora: LoraConfig = NO_LORA) -> Config:
    batch = BatchConfig(tokens_per_micro_batch=tokens_per_micro_batch)
    return Config(model=ModelConfig(path=""), data=DataConfig(train=[]), batch=batch, parallel=parallel, lora=lora)


def random_policy(model_config: PretrainedConfig, config: Config, world: World) -> Policy:
    """Small random weights."""
    mesh = make_mesh(world, config.parallel)
    policy = build_policy(model_config, config.parallel, "float32", mesh, adapters=find_adapters(config))
    torch.manual_seed(0)
    for parameter in policy.model.parameters():
        parameter.to_local().detach().normal_(0.0, 0.02)
    return policy


def one_step(policy: Policy, packer: Packer, trees: Sequence[Tree], config: Config) -> None:
    """As the trainer runs it, from the plan to the update."""
    optimizer = make_optimizer(trained(policy.model.parameters()), config.optim)
    train_step(policy, optimizer, packer.pack(packer.plan(trees)), config, config.optim.lr, lambda: False)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def seen_pairs(query: Tensor, key: Tensor, is_causal: bool, attn_mask: Tensor | None) -> int:
    """(query, key) pairs that a mask lets through: finite entries of a float mask; of causal attention over n tokens
    the triangle n(n+1)/2.
    """
    if attn_mask is not None:
        return int(attn_mask.isfinite().sum())
    num_queries, num_keys = query.shape[2], key.shape[2]
    assert is_causal
    assert num_queries == num_keys
    return num_queries * (num_queries + 1) // 2


def attention_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    out_val: Any = None,
) -> int:
    """Two products, q k^T and p v: 2 x 2 D FLOPs for each head and each pair that is seen."""
    return 2 * 2 * query.shape[1] * query.shape[3] * seen_pairs(query, key, is_causal, attn_mask)


def attention_backward_flops(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    out_val: Any = None,
) -> int:
    """Five products: q k^T once more, since the fused kernel keeps no scores, and the gradients of p, v, q and k."""
    return 5 * 2 * query.shape[1] * query.shape[3] * seen_pairs(query, key, is_causal, attn_mask)


def counted_flops(work: Callable[[], object]) -> int:
    """FLOPs of matrix products, those in a CPU's fused attention too, which FlopCounterMode does not know."""
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    for formula in mapping.values():
        formula._get_raw = True  # type: ignore[attr-defined]  # tensors, not shapes: the mask is read
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


def mixed_pairs(count: int, vocab_size: int) -> list[Pair]:
    """Lengths as of conversations, lognormal: prompts with a median of 90 tokens and at most 256, completions of 45
    and 128; some prompts have three completions.
    """
    rng = np.random.default_rng(0)

    def ids(median: int, most: int) -> np.ndarray:
        length = int(np.clip(rng.lognormal(np.log(median), 0.8), 1, most))
        return rng.integers(3, vocab_size, length).astype(np.int32)

    pairs: list[Pair] = []
    while len(pairs) < count:
        prompt, first, second, third = ids(90, 256), ids(45, 128), ids(45, 128), ids(45, 128)
        pairs += [Pair(prompt, first, second)] + ([Pair(prompt, third, second)] if len(pairs) % 4 == 0 else [])
    return pairs


def counted_over_formula(
    family: str, parallel: ParallelConfig, world: World, lora: LoraConfig = NO_LORA, gradients: Trained | None = None
) -> float:
    """FLOPs of forward, backward and update of three micro-batches, by those of the formula with `gradients`, by
    default those that are found.
    """
    model_config = AutoConfig.for_model(family, vocab_size=VOCAB, **FAMILIES[family])
    config = make_config(parallel, tokens_per_micro_batch=1200, lora=lora)
    policy, packer = (
        random_policy(model_config, config, world),
        replace(make_packer(config, world, model_config), ref_logps=lambda *_: 0.0),
    )
    trees = grow_trees(mixed_pairs(16, VOCAB))
    formula = 0.0
    for micro_batch in packer.plan(trees).micro_batches[0]:
        rows = sum(tree.num_scored for tree in micro_batch)
        recomputed = recomputed_share(rows, VOCAB, torch.float32, parallel.head_memory_mib * MIB, "cpu")
        assert (recomputed > 0) == (parallel.head_memory_mib == 1)
        paid = units(parallel.activation_checkpointing, recomputed, gradients or trained_of(config, model_config))
        formula += step_flops(micro_batch, cost_model(model_config), paid)
    return counted_flops(lambda: one_step(policy, packer, trees, config)) / formula


@pytest.mark.parametrize(
    ("family", "head_memory_mib", "checkpointing"),
    [
        ("llama", 64, "full"),
        ("llama", 1, "none"),
        *((family, *k) for family in FAMILIES for k in ((64, "none"), (1, "full"))),
    ],
)
def test_flops_of_a_step(family: str, head_memory_mib: int, checkpointing: Any, world: World) -> None:
    """Asked is a ratio between 0.98 and 1.05; it is 1, as every product is in the formula. A budget of 1 MiB takes 87
    rows of logits, 64 MiB all of a micro-batch.
    """
    parallel = ParallelConfig(activation_checkpointing=checkpointing, head_memory_mib=head_memory_mib)
    assert counted_over_formula(family, parallel, world) == pytest.approx(1.0, abs=0.001)


ADAPTERS = {
    "all linear": LoraConfig(rank=4),
    "queries and values": LoraConfig(rank=4, target_modules=["q_proj", "v_proj"]),
    "attention of GPT-2": LoraConfig(rank=4, target_modules=["c_attn"]),
    "some layers": LoraConfig(rank=4, target_modules=r".*\.[12]\.(mlp|attn|self_attn)\..*"),
    "embeddings": LoraConfig(rank=4, train_embeddings=True),
    "large and with DoRA": LoraConfig(rank=16, dora=True),
    "quantized": LoraConfig(rank=4, quantize="nf4"),
    "queries of quantized": LoraConfig(rank=4, target_modules=["q_proj"], quantize="nf4"),
    "attention of a quantized GPT-2": LoraConfig(rank=4, target_modules=["c_attn"], quantize="nf4"),
}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        *((family, "all linear") for family in FAMILIES),
        ("llama", "queries and values"),
        ("qwen3", "queries and values"),
        ("gpt2", "attention of GPT-2"),
        *((family, "quantized") for family in FAMILIES),
        ("llama", "queries of quantized"),
        ("gpt2", "attention of a quantized GPT-2"),
        *((family, kind) for family in ("llama", "gpt2") for kind in ("some layers", "embeddings")),
    ],
)
def test_flops_of_a_step_with_adapters(family: str, lora: str, checkpointing: Any, world: World) -> None:
    """Asked is a ratio between 0.98 and 1.05. No product is left out: frozen ones have no gradient of their weight, and
    none of their input below the first adapter.
    """
    parallel = ParallelConfig(activation_checkpointing=checkpointing, head_memory_mib=1)
    assert counted_over_formula(family, parallel, world, ADAPTERS[lora]) == pytest.approx(1.0, abs=0.001)


def test_flops_of_dora(world: World) -> None:
    """Its products with a unit matrix are not in the formula: 64 and 176 tokens a micro-batch, of 1,200."""
    parallel = ParallelConfig(activation_checkpointing="none")
    assert 0.98 <= counted_over_formula("llama", parallel, world, ADAPTERS["large and with DoRA"]) <= 1.05


def test_flops_of_adapters_by_hand() -> None:
    """A Llama of 2 layers whose 7 products are 8 x 8 each, and adapters of rank 4, each as much as a product: 28 in a
    forward pass, 14 of them of adapters; 28 gradients of inputs, without q, k, v and three halves of adapters in the
    first layer; 14 gradients of weights. In units of the 14 products. Of an adapter B is half; the last products
    are 2.
    """
    sizes = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    model_config = AutoConfig.for_model("llama", **sizes, num_attention_heads=1, num_key_value_heads=1)
    found = trained_of(make_config(ParallelConfig(), 1, ADAPTERS["all linear"]), model_config)
    assert vars(found) == pytest.approx(vars(Trained(1.0, (28 - 4.5) / 14, 1.0, 1.0, 0.0, 0.5)))
    assert model_flops(ForwardFlops(14.0, 0.0, 0.0), found) == pytest.approx(28 + 23.5 + 14)
    assert model_flops(ForwardFlops(0.0, 10.0, 7.0), found) == 3 * 10.0 + 2 * 7.0
    assert model_flops(ForwardFlops(1.0, 10.0, 100.0)) == 3 * 111.0


@pytest.mark.parametrize("kind", ["llama", "qwen3", *UNGATED])
def test_weights_of_a_layer(kind: str) -> None:
    """The oracle: the matrices of a layer that was built, two FLOPs a weight and token. Some MLPs have no gate."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    own = {"n_inner": 80} if kind == "gpt_bigcode" else {"intermediate_size": 80, "num_key_value_heads": 2}
    model_config = AutoConfig.for_model(kind, **sizes, **own)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    (layer,) = decoder_layers(model)
    matrices = sum(weight.numel() for name, weight in layer.named_parameters() if weight.dim() == 2)
    assert cost_model(model_config).per_token == 2 * matrices


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_card_that_is_not_in_the_table_is_not_taken_for_another(name: str, peak: float | None) -> None:
    assert device_peak(name, "bfloat16") == peak


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_selective_checkpointing_are_rough(family: str, world: World) -> None:
    parallel = ParallelConfig(activation_checkpointing="selective")
    assert 0.9 <= counted_over_formula(family, parallel, world) <= 1.05


# --- tokens ----------------------------------------------------------------------------------------------------------


def least_tokens(pairs: Sequence[Pair]) -> int:
    """Each prompt of the step once and each completion of it once: P + sum C."""
    prompts = {pair.prompt_ids.tobytes() for pair in pairs}
    completions = {
        (pair.prompt_ids.tobytes(), ids.tobytes()) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)
    }
    return (sum(map(len, prompts)) + sum(len(ids) for _, ids in completions)) // np.int32().itemsize


@pytest.mark.usefixtures("shared_data")
@pytest.mark.parametrize("tokens_per_micro_batch", [2048, 16384])
@pytest.mark.parametrize("workload", ["hh", "pandalm"])
def test_the_body_is_given_no_token_twice(workload: str, tokens_per_micro_batch: int, world: World) -> None:
    """A step of 64 pairs of the real sets: at most 1.02 times P + sum C over all micro-batches. Chosen and rejected
    apart, each with its prompt, would be more than that. Of the token ids only their equality matters.
    """
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model_config = AutoConfig.for_model("llama", vocab_size=1000, **sizes)
    config = make_config(ParallelConfig(), tokens_per_micro_batch)
    policy, packer = (
        random_policy(model_config, config, world),
        replace(make_packer(config, world, model_config), ref_logps=lambda *_: 0.0),
    )
    given: list[int] = []
    policy.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    pairs = [
        Pair(pair.prompt_ids % 1000, pair.chosen_ids % 1000, pair.rejected_ids % 1000)
        for pair in WORKLOADS[workload].pairs(64)
    ]
    one_step(policy, packer, grow_trees(pairs), config)
    assert sum(given) <= 1.02 * least_tokens(pairs)
    unshared = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    assert unshared > 1.3 * least_tokens(pairs)
