"""The policy with adapters against the oracle: each completion alone through peft on the plain Hugging Face model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from dpo.adapters.names import file_name
from dpo.adapters.spec import AdapterSpec
from dpo.base.errors import UserError
from dpo.batch.costs import cost_model
from dpo.batch.packing import pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.config import LossConfig, ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from dpo.model.build import build_policy, load_weights, read_start
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.step.objective import pair_losses
from tests.model.test_policy import BETA, plain_step, ref_logp, rms_norm_without_cast, save_other, some_pairs
from tests.support.models import FAMILIES, plain_logp, save_model
from tests.support.peft_models import plain_peft, save_adapter, spec_of

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


@pytest.fixture(autouse=True)
def _no_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No norm computes in float32, in either model."""
    for norm in (LlamaRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", rms_norm_without_cast)
    monkeypatch.setattr(Gemma3RMSNorm, "forward", gemma_norm_without_cast)


def gemma_norm_without_cast(self: Any, hidden: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


def load(world: World, folder: Path, spec: AdapterSpec, dtype: str = "float64", **parallel: Any) -> Policy:
    config = ParallelConfig(reduce_dtype=dtype, **parallel)
    policy = build_policy(read_model_config(folder, False), config, dtype, make_mesh(world, config), adapters=spec)
    load_weights(policy, folder)
    read_start(policy)
    return policy


def run(policy: Policy, budget: int = 1) -> tuple[dict[bytes, Tensor], dict[str, Tensor]]:
    """What the trainer computes, a micro-batch a prompt: the log-probability of each (prompt, completion), and the
    gradient of the mean DPO loss by the names of the tensors in their file.
    """
    plan, logps = plan_step(grow_trees(some_pairs()), 1, budget, cost_model(policy.config)), {}
    for number, trees in enumerate(plan.micro_batches[0], start=1):
        announce_backward(policy, number == len(plan.micro_batches[0]))
        batch = pack(trees, plan, ref_logp, policy.row_format).to(policy.device)
        found = completion_logps(policy, batch)
        losses, _ = pair_losses(found, batch, LossConfig(beta=BETA))
        (losses.sum() / batch.pairs_in_step).backward()
        names = [tree.prompt_ids.tobytes() + b"|" + c.tobytes() for tree in trees for c in tree.completion_ids]
        logps |= dict(zip(names, found.detach(), strict=True))
    frozen = [name for name, p in policy.model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen, frozen
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}  # tied ones once
    return logps, {file_name(name): p.grad.full_tensor() for name, p in trained.items()}


def oracle(model: Any) -> tuple[dict[bytes, Tensor], dict[str, Tensor]]:
    """The same of peft's model, pair by pair and completion by completion."""
    logps = plain_step(model)
    inner = model.base_model.model.named_parameters()
    return logps, {file_name(name): p.grad for name, p in inner if p.requires_grad}


def assert_equal(found: Any, wanted: Any) -> None:
    """Log-probabilities and gradients, tensor by tensor in the L2 norm."""
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(value.norm() > 0 for value in other.values())
        errors = {name: ((one[name] - other[name]).norm() / other[name].norm()).item() for name in other}
        assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])


def base_of(folder: Path, family: str) -> Path:
    return save_model(folder, family) if family in FAMILIES else save_other(folder, family)


KINDS: dict[str, dict[str, Any]] = {"plain": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
"""The trainer's keys of each kind; peft's have `use_` before them."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gpt-neox", "gpt2", "gemma3_text"])
def test_families_are_exact(family: str, kind: str, world: World, tmp_path: Path) -> None:
    """All linear layers: GPT-2's are Conv1D, GPT-NeoX has query, key and value in one. B is not 0."""
    base, keys = base_of(tmp_path / "base", family), KINDS[kind]
    adapter = save_adapter(tmp_path / "adapter", base, **{f"use_{name}": value for name, value in keys.items()})
    policy = load(world, base, spec_of(adapter, **keys))
    assert_equal(run(policy), oracle(plain_peft(base, adapter, torch.float64)))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_trained_embeddings_are_exact(family: str, world: World, tmp_path: Path) -> None:
    """Embeddings and head are trained whole, in one tensor where they are tied."""
    base = base_of(tmp_path / "base", family)
    adapter = save_adapter(tmp_path / "adapter", base, embeddings=True)
    policy = load(world, base, spec_of(adapter, embeddings=True))
    found = run(policy)
    assert sum("lora_" not in name for name in found[1]) == (2 if family == "llama" else 1)
    assert_equal(found, oracle(plain_peft(base, adapter, torch.float64, embeddings=True)))


@pytest.mark.parametrize("words", [("lm_head",), ("embed_tokens", "lm_head"), ("norm",)])
def test_trained_modules_are_exact(words: tuple[str, ...], world: World, tmp_path: Path) -> None:
    """peft's modules_to_save: `norm` is the end of the names of three norms, two of which a layer has."""
    base = base_of(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, modules_to_save=list(words))
    found = run(load(world, base, spec_of(adapter, trained_modules=words)))
    assert sum("lora_" not in name for name in found[1]) == (2 * 2 + 1 if words == ("norm",) else len(words))
    logps, gradients = oracle(plain_peft(base, adapter, torch.float64))
    plain = {name.replace(".modules_to_save.default", ""): gradient for name, gradient in gradients.items()}
    assert_equal(found, (logps, plain))


def test_half_of_what_is_tied_is_refused(world: World, tmp_path: Path) -> None:
    """peft would train a head of its own beside the frozen embedding; both are trained in one tensor."""
    base = base_of(tmp_path / "base", "llama-tied")
    one = save_adapter(tmp_path / "one", base, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"ensure_weight_tying: .* have a copy of one alone"):
        load(world, base, spec_of(one, trained_modules=("lm_head",)))
    both = ("embed_tokens", "lm_head")
    adapter = save_adapter(tmp_path / "both", base, modules_to_save=list(both))
    found = run(load(world, base, spec_of(adapter, trained_modules=both)))
    assert_equal(found, oracle(plain_peft(base, save_adapter(tmp_path / "none", base), torch.float64, embeddings=True)))


def test_adapters_of_parameters_are_exact(world: World, tmp_path: Path) -> None:
    base, names = base_of(tmp_path / "base", "llama"), ["v_proj.weight", "up_proj.weight"]
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], target_parameters=names)
    spec = spec_of(adapter, target_modules=("q_proj",), target_parameters=tuple(names))
    found = run(load(world, base, spec))
    assert len(found[1]) == 2 * 2 * 3
    assert_equal(found, oracle(plain_peft(base, adapter, torch.float64)))


def test_ranks_and_alphas_of_some_layers_are_exact(world: World, tmp_path: Path) -> None:
    """Other ranks and factors by a pattern, in one of two layers."""
    base = base_of(tmp_path / "base", "llama")
    patterns = {"rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 11}}
    only = {"target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [1]}
    adapter = save_adapter(tmp_path / "adapter", base, **patterns, **only)
    spec = spec_of(adapter, target_modules=("q_proj", "v_proj", "up_proj"), layers_to_transform=(1,), **patterns)
    found = run(load(world, base, spec))
    assert len(found[1]) == 6
    assert_equal(found, oracle(plain_peft(base, adapter, torch.float64)))


def test_the_oracle_has_the_adapters(world: World, tmp_path: Path) -> None:
    """Log-probabilities with and without them differ by more than a hundredth of a nat."""
    base = base_of(tmp_path / "base", "llama")
    model = plain_peft(base, save_adapter(tmp_path / "adapter", base), torch.float64)
    pair = some_pairs()[0]
    with torch.no_grad(), model.disable_adapter():
        without = plain_logp(model, pair.prompt_ids, pair.chosen_ids)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    assert without == pytest.approx(plain_logp(plain, pair.prompt_ids, pair.chosen_ids).item())
    assert abs(plain_logp(model, pair.prompt_ids, pair.chosen_ids).item() - without.item()) > 0.01
