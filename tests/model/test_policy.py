"""The policy against the oracle: each completion alone through the plain Hugging Face model."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from dpo.base.errors import UserError
from dpo.batch.block_mask import host_mask
from dpo.batch.costs import cost_model
from dpo.batch.layout import Layout, attention_windows
from dpo.batch.packing import PackedBatch, RowFormat, pack, padded_length
from dpo.batch.plan import plan_step
from dpo.batch.trees import Tree, grow_trees
from dpo.config import LossConfig, ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from dpo.model.build import build_policy, load_weights
from dpo.model.log_probs import ChunkedTokenLogProbs
from dpo.model.model_config import read_model_config
from dpo.model.parallelize import _selective_contexts
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.pairs.pair_set import Pair
from dpo.step.objective import pair_losses
from tests.support.models import FAMILIES, VOCAB, family_config, plain_logp, plain_model, save_model

BETA, MIB = 0.5, 2**20
OTHERS: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "phi": {"num_key_value_heads": 4},
}
"""Families that go the same way, each for what it has of its own: dropout kept as numbers and positions from 2 on;
scaled embeddings; windows on some layers; a head with a bias."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


def load(world: World, folder: Path, dtype: str = "float32", **parallel: Any) -> Policy:
    """The trainer's policy of a folder; in float64 gradients are reduced in float64."""
    config = ParallelConfig(**({"reduce_dtype": "float64"} if dtype == "float64" else {}) | parallel)
    policy = build_policy(read_model_config(folder, False), config, dtype, make_mesh(world, config))
    load_weights(policy, folder)
    return policy


def some_pairs() -> list[Pair]:
    """Five pairs on two prompts of 9 and 17 tokens: shared prompts, shared completions, one pair twice, a completion of
    one token.
    """
    rng = np.random.default_rng(5)
    p, q, a, b, c, d, e = (rng.integers(3, VOCAB, n).astype(np.int32) for n in (9, 17, 5, 14, 1, 8, 3))
    return [Pair(p, a, b), Pair(p, c, a), Pair(q, d, e), Pair(p, a, b), Pair(p, b, c)]


def ref_logp(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> float:
    return -4.0 * len(completion_ids)


def batches_of(
    policy: Policy, budget: int = 1000, row_length: Callable[[int], int] = int
) -> list[tuple[PackedBatch, tuple[Tree, ...]]]:
    plan = plan_step(grow_trees(some_pairs()), 1, budget, cost_model(policy.config))
    row_format = replace(policy.row_format, row_length=row_length)
    return [(pack(trees, plan, ref_logp, row_format).to(policy.device), trees) for trees in plan.micro_batches[0]]


def run(
    policy: Policy, budget: int = 1000, head_bytes: int = MIB, row_length: Callable[[int], int] = int
) -> tuple[dict[bytes, Tensor], dict[str, Tensor]]:
    """What the trainer computes: the log-probability of each (prompt, completion), and the gradient of the mean DPO
    loss.
    """
    policy = replace(policy, head_bytes=head_bytes)
    logps, batches = {}, batches_of(policy, budget, row_length)
    for number, (batch, trees) in enumerate(batches, start=1):
        announce_backward(policy, number == len(batches))
        found = completion_logps(policy, batch)
        losses, _ = pair_losses(found, batch, LossConfig(beta=BETA))
        (losses.sum() / batch.pairs_in_step).backward()
        names = [tree.prompt_ids.tobytes() + b"|" + c.tobytes() for tree in trees for c in tree.completion_ids]
        logps |= dict(zip(names, found.detach().cpu(), strict=True))
    return logps, {name: p.grad.full_tensor().cpu() for name, p in policy.model.named_parameters()}


def oracle(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[bytes, Tensor], dict[str, Tensor]]:
    """The same of a plain model."""
    model = plain_model(folder, dtype)
    logps = plain_step(model)
    return logps, {name: p.grad for name, p in model.named_parameters()}


def plain_step(model: Any) -> dict[bytes, Tensor]:
    """The log-probabilities, pair by pair and completion by completion; and the gradient of -log sigmoid(beta h),
    averaged over the pairs, in the parameters.
    """
    logps, losses = {}, []
    for pair in some_pairs():
        ratios = []
        for ids in (pair.chosen_ids, pair.rejected_ids):
            logp = plain_logp(model, pair.prompt_ids, ids)
            logps[pair.prompt_ids.tobytes() + b"|" + ids.tobytes()] = logp.detach()
            ratios.append(logp - ref_logp(pair.prompt_ids, ids))
        losses.append(-F.logsigmoid(BETA * (ratios[0] - ratios[1])))
    torch.stack(losses).mean().backward()
    return logps


def assert_equal(found: Any, wanted: Any, tolerance: float) -> None:
    """Log-probabilities to `tolerance` relative; gradients tensor by tensor in the L2 norm."""
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        errors = {name: ((one[name] - other[name]).norm() / other[name].norm()).item() for name in other}
        assert max(errors.values()) <= tolerance, max(errors.items(), key=lambda item: item[1])


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_exact(family: str, world: World, tmp_path: Path) -> None:
    """In float32, 1e-5. Mistral's window of 12 is shorter than either prompt with its completions."""
    folder = save_model(tmp_path, family)
    assert_equal(run(load(world, folder)), oracle(folder), 1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_padding_changes_nothing(family: str, world: World, tmp_path: Path) -> None:
    """Rows as they are on CUDA, of 256 tokens each, most of them padding: the same log-probabilities and gradients."""
    folder = save_model(tmp_path, family) if family in FAMILIES else save_other(tmp_path, family)
    policy = load(world, folder)
    assert [len(batch.tokens) for batch, _ in batches_of(policy, 1, padded_length)] == [256, 256]
    assert_equal(run(policy, budget=1, row_length=padded_length), oracle(folder), 1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_the_path_of_cuda_forward(family: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention with its block mask through the whole model, uncompiled, on a CPU, where it has no backward."""
    monkeypatch.setattr("dpo.model.attention._compiled_flex_attention", lambda: flex_attention)
    folder = save_model(tmp_path, family) if family in FAMILIES else save_other(tmp_path, family)
    policy, (wanted, _) = load(world, folder), oracle(folder)
    (batch, trees), *_ = batches_of(policy, row_length=padded_length)
    masks = {window: host_mask(batch.layout.spans, window, pin=False) for window in policy.windows}
    batch = dataclasses.replace(batch, layout=Layout(batch.layout.spans, masks)).to(policy.device)
    with torch.no_grad():
        found = completion_logps(policy, batch)
    names = [tree.prompt_ids.tobytes() + b"|" + c.tobytes() for tree in trees for c in tree.completion_ids]
    torch.testing.assert_close(found, torch.stack([wanted[name] for name in names]), rtol=1e-5, atol=1e-4)


def rms_norm_without_cast(self: Any, hidden: Tensor) -> Tensor:
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mistral"])
def test_families_are_exact_in_float64(
    family: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-10, with RMSNorm's cast to float32 replaced in both models; in micro-batches of one tree each."""
    for norm in (LlamaRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", rms_norm_without_cast)
    folder = save_model(tmp_path, family)
    policy = load(world, folder, "float64")
    assert len(batches_of(policy, budget=1)) == 2
    assert_equal(run(policy, budget=1), oracle(folder, torch.float64), 1e-10)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_exact(family: str, world: World, tmp_path: Path) -> None:
    """OPT adds a bias to all keys of a query alike, which softmax does not see: that gradient is rounding, and left
    out.
    """
    folder = save_other(tmp_path, family)
    found, wanted = run(load(world, folder)), oracle(folder)
    for name in [name for name in wanted[1] if name.endswith("k_proj.bias") and family == "opt"]:
        assert found[1].pop(name).norm() <= 1e-6
        wanted[1].pop(name)
    assert_equal(found, wanted, 1e-5)


def save_other(folder: Path, family: str) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **OTHERS[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def tiny_config(model_type: str, **facts: Any) -> PretrainedConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, vocab_size=VOCAB, max_position_embeddings=256, **sizes | ends | facts)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt-neox", "gpt2"])
def test_the_chunked_head_is_exact(family: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of logits at a time; the shape of tied weights' gradient is that of embedding and head together."""
    calls = []
    forward = ChunkedTokenLogProbs.forward
    monkeypatch.setattr(
        ChunkedTokenLogProbs, "forward", lambda ctx, *args: calls.append(args[-1].num_rows) or forward(ctx, *args)
    )
    folder = save_model(tmp_path, family)
    assert_equal(run(load(world, folder), head_bytes=3 * VOCAB * 4), oracle(folder), 1e-5)
    assert calls == [3]


def test_dropout_is_off(world: World, tmp_path: Path) -> None:
    """In training mode, with every dropout of the config at 1/2: two passes are equal bit by bit, and the oracle's."""
    config = dataclasses.replace(family_config("gpt2"), attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    folder = save_model(tmp_path, "gpt2")
    config.save_pretrained(folder)
    policy = load(world, folder)
    assert policy.model.training
    assert policy.config.attn_pdrop == 0.5
    (batch, _), *_ = batches_of(policy)
    first, second = (completion_logps(policy, batch) for _ in range(2))
    assert torch.equal(first, second)
    assert_equal(run(policy), oracle(folder), 1e-5)


@pytest.mark.parametrize("name", ["inductor_compiled_code", "flex_attention"])
def test_selective_checkpointing_keeps_attention_on_cuda(name: str) -> None:
    """What it meets there: the call that `block_attention` compiles, or FlexAttention itself in a compiled layer."""
    caching, _ = _selective_contexts()
    op = getattr(torch._higher_order_ops, name)
    assert callable(op) and str(op) == name
    context = SelectiveCheckpointContext(is_recompute=False)
    assert caching.policy_fn(context, op) == CheckpointPolicy.MUST_SAVE
    assert caching.policy_fn(context, torch.ops.aten.mul.Tensor) == CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_asked_for_on_cuda_alone(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is built, so before anything is compiled, and also off where another model had it on."""
    asked: list[Any] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("dpo.model.build.build_on_meta", lambda *args: asked.append("model"))
    for work in ("parallelize", "_materialize"):
        monkeypatch.setattr(f"dpo.model.build.{work}", lambda *args: None)
    parallel = ParallelConfig(compute_dtype="float32", tf32=tf32)
    for device_type in ("cuda", "cpu"):
        build_policy(family_config("llama"), parallel, "float32", SimpleNamespace(device_type=device_type))
    assert asked == ["high" if tf32 else "highest", "model", "model"]


def test_bfloat16_computes_with_float32_masters(world: World, tmp_path: Path) -> None:
    """Log-probabilities come out in float32, off by at most 0.05 sqrt(tokens), but off; gradients and weights stay
    float32, each gradient within 5 %.
    """
    folder = save_model(tmp_path, "llama")
    policy = load(world, folder, compute_dtype="bfloat16")
    (logps, gradients), (wanted, wanted_gradients) = run(policy), oracle(folder)
    for name, value in logps.items():
        num_tokens = len(name.split(b"|")[-1]) // 4
        assert value.dtype == torch.float32
        assert 0 < abs(value - wanted[name]) <= 0.05 * num_tokens**0.5
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted_gradients[name]).norm() <= 0.05 * wanted_gradients[name].norm()


def test_a_filler_gives_every_parameter_a_gradient_of_zero(world: World, tmp_path: Path) -> None:
    for family in ("llama", "llama-tied"):
        policy = load(world, save_model(tmp_path / family, family))
        plan = plan_step(grow_trees(some_pairs()), 3, 1000, cost_model(policy.config))
        batch = pack((), plan, ref_logp, RowFormat(policy.windows, policy.device))
        losses, _ = pair_losses(completion_logps(policy, batch), batch, LossConfig(beta=BETA))
        losses.sum().backward()
        assert all(p.grad is not None and not p.grad.full_tensor().any() for p in policy.model.parameters())


# --- refused ---------------------------------------------------------------------------------------------------------

REFUSED: Mapping[str, tuple[PretrainedConfig, str]] = {
    "ALiBi": (AutoConfig.for_model("bloom", hidden_size=32, n_layer=2, n_head=4), "bloom .*ALiBi"),
    "ALiBi as a flag": (AutoConfig.for_model("falcon", alibi=True), "falcon .*ALiBi"),
    "experts": (tiny_config("mixtral", num_key_value_heads=2), "mixtral .*mixture of experts"),
    "capped attention": (tiny_config("gemma2", num_key_value_heads=2), "gemma2 .*cap its logits"),
    "scaled logits": (tiny_config("cohere", num_key_value_heads=2), "cohere .*head scales"),
    "an encoder": (AutoConfig.for_model("t5"), "t5 .*only decoders"),
    "layers without attention": (
        tiny_config("lfm2", layer_types=["conv", "full_attention"]),
        "lfm2 .*conv cannot share",
    ),
    "attention of its own": (
        AutoConfig.for_model(
            "gpt_neo", hidden_size=32, num_heads=4, num_layers=2, attention_types=[[["global", "local"], 1]]
        ),
        "gpt_neo .*attention",
    ),
    "a recurrent state": (
        AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2),
        "mamba .*linear_attention cannot share",
    ),
    "a head of several layers": (tiny_config("roberta", is_decoder=True), "roberta .*more than one linear layer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_that_would_not_be_exact_are_refused(what: str, world: World, tmp_path: Path) -> None:
    """By name, with the reason, before any weights are read."""
    config, message = REFUSED[what]
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^model\.path: {message}"):
        read = read_model_config(tmp_path, False)
        build_policy(read, ParallelConfig(), "float32", make_mesh(world, ParallelConfig()))


# --- what the plan and attention are told ----------------------------------------------------------------------------


def test_windows_of_a_config() -> None:
    """Qwen may name a window that it does not use; others have one on some layers."""
    assert attention_windows(family_config("llama")) == (None,)
    assert attention_windows(family_config("mistral")) == (12,)
    assert attention_windows(PretrainedConfig(sliding_window=6, use_sliding_window=False)) == (None,)
    assert set(attention_windows(tiny_config("qwen2", **OTHERS["qwen2"]))) == {None, 6}
    assert set(attention_windows(tiny_config("gemma3_text", **OTHERS["gemma3_text"]))) == {None, 6}


def test_costs_by_hand() -> None:
    """Llama, 2 layers, width 32, 4 heads of 8, 2 kv heads, MLP of 48 with three products, 97 tokens: weights of a layer
    32 (2*32 + 2*16) + 3*32*48 = 7,680, two FLOPs each; scores and values 4*32 a layer; head 2*32*97. GPT-2: 32 (4*32) +
    2*32*128 = 12,288, the MLP being 4 widths wide.
    """
    llama, gpt2 = cost_model(family_config("llama")), cost_model(family_config("gpt2"))
    assert (llama.per_token, llama.per_attended, llama.per_scored) == (2 * 2 * 7680, 2 * 4 * 32, 2 * 32 * 97)
    assert (gpt2.per_token, gpt2.per_attended, gpt2.per_scored) == (2 * 2 * 12288, 2 * 4 * 32, 2 * 32 * 97)
