"""How adapters start and are read, what is frozen beside them, and what makes the key of a start."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo.adapters.inject import trained
from dpo.adapters.names import is_of_adapter
from dpo.adapters.spec import AdapterSpec
from dpo.adapters.start import start_adapters, start_hash, trained_tensors, uniform
from dpo.adapters.switch import adapters_off
from dpo.base.errors import UserError
from dpo.batch.costs import cost_model
from dpo.batch.packing import PackedBatch, pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.config import OptimConfig, ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from dpo.hub.files import ADAPTER_TENSORS
from dpo.model.build import build_policy, load_weights, read_start
from dpo.model.kernels import compile_layers
from dpo.model.model_config import read_model_config
from dpo.model.parallelize import decoder_layers
from dpo.model.policy import Policy, completion_logps
from dpo.step.optim import make_optimizer
from tests.model.test_policy import ref_logp, some_pairs
from tests.support.models import save_model
from tests.support.peft_models import save_adapter, spec_of


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


def load(world: World, folder: Path, spec: AdapterSpec | None, seed: int = 0, **parallel: Any) -> Policy:
    config = ParallelConfig(**parallel)
    policy = build_policy(read_model_config(folder, False), config, "float32", make_mesh(world, config), adapters=spec)
    load_weights(policy, folder)
    if spec:
        start_adapters(policy.model, seed)
        read_start(policy)
    return policy


def batch_of(policy: Policy) -> PackedBatch:
    plan = plan_step(grow_trees(some_pairs()), 1, 10_000, cost_model(policy.config))
    return pack(plan.micro_batches[0][0], plan, ref_logp, policy.row_format)


def logps_of(policy: Policy) -> Tensor:
    with torch.no_grad():
        return completion_logps(policy, batch_of(policy))


# --- starts ----------------------------------------------------------------------------------------------------------


def test_a_is_uniform_and_depends_on_seed_and_name() -> None:
    """Uniform in +-1/sqrt(64) = +-1/8: of 6,400 numbers the mean is 0 within 4 sigma, (1/8) / sqrt(3 x 6400) each, and
    the mean square 1/192.
    """
    shape = torch.Size((100, 64))
    values = uniform("a", shape, 1)
    assert values.dtype == torch.float64 and values.abs().max() <= 1 / 8
    assert abs(values.mean()) <= 4 / 8 / (3 * 6400) ** 0.5
    assert values.square().mean().item() == pytest.approx(1 / 192, rel=0.05)
    assert torch.equal(values, uniform("a", shape, 1))
    for other in (uniform("b", shape, 1), uniform("a", shape, 2)):
        assert abs((values * other).mean()) <= 4 / 192 / 6400**0.5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fresh_start(family: str, world: World, tmp_path: Path) -> None:
    """B is 0, each A has numbers of its own, and a magnitude is the norm of what leads to an output: a row of a Linear,
    a column of a Conv1D.
    """
    folder = save_model(tmp_path, family)
    policy, base = load(world, folder, spec_of(None, dora=True)), load_file(folder / "model.safetensors")
    parameters = {name: p.detach().full_tensor() for name, p in policy.model.named_parameters()}
    firsts = [value[:, :32] for name, value in parameters.items() if ".lora_A." in name]
    assert len({tuple(first.flatten().tolist()) for first in firsts}) == len(firsts)
    assert not any(value.any() for name, value in parameters.items() if ".lora_B." in name)
    found = {name: value for name, value in parameters.items() if "magnitude" in name}
    assert len(found) == len(firsts)
    for name, value in found.items():
        weight = base[name.partition(".lora_magnitude_vector")[0] + ".weight"].double().numpy()
        expected = np.sqrt((weight**2).sum(0 if family == "gpt2" else 1))
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_start_computes_as_the_whole_model(
    world: World, tmp_path: Path, compute: str, dtype: torch.dtype
) -> None:
    """To the last bit, whether the file or the forward pass rounds the weights; with adapters on too, but for DoRA's
    division by a norm.
    """
    folder = save_model(tmp_path, "llama", dtype=dtype)
    expected = logps_of(load(world, folder, None, compute_dtype=compute))
    for spec in (spec_of(None), spec_of(None, dora=True)):
        policy = load(world, folder, spec, compute_dtype=compute)
        with adapters_off(policy.model):
            assert torch.equal(logps_of(policy), expected)
        assert spec.dora or torch.equal(logps_of(policy), expected)


def test_the_base_is_frozen_in_the_compute_dtype(world: World, tmp_path: Path) -> None:
    """It has no gradient and no state of the optimizer; adapters are float32."""
    policy = load(world, save_model(tmp_path, "llama"), spec_of(None), compute_dtype="bfloat16")
    optimizer = make_optimizer(trained(policy.model.parameters()), OptimConfig(name="adamw", lr=1e-3))
    completion_logps(policy, batch_of(policy)).sum().backward()
    optimizer.step()
    for name, parameter in policy.model.named_parameters():
        is_adapter = is_of_adapter(name)
        assert parameter.dtype == (torch.float32 if is_adapter else torch.bfloat16), name
        assert [parameter.requires_grad, parameter.grad is not None, parameter in optimizer.state] == 3 * [is_adapter]


def test_no_gradient_of_a_frozen_weight_is_computed(world: World, tmp_path: Path) -> None:
    """The graph of a backward pass ends in adapters alone, so that not even a temporary one is."""
    policy = load(world, save_model(tmp_path, "llama"), spec_of(None))
    todo, seen, ends = [completion_logps(policy, batch_of(policy)).grad_fn], set(), 0
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ends += node.name().endswith("AccumulateGrad")
            todo += [before for before, _ in node.next_functions]
    assert ends == len(trained_tensors(policy.model)) == 2 * 2 * 7


def test_adapters_are_on_again_after_a_failure(world: World, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    policy = load(world, base, spec_of(save_adapter(tmp_path / "adapter", base)))
    before = logps_of(policy)
    with pytest.raises(KeyError), adapters_off(policy.model):
        assert (logps_of(policy) - before).abs().max() > 0.01
        raise KeyError
    assert torch.equal(logps_of(policy), before)


def test_compiled_layers_see_that_adapters_are_off(world: World, tmp_path: Path) -> None:
    """On, off and on again, of layers whose graphs are kept."""
    base = save_model(tmp_path / "base", "llama")
    policy = load(world, base, spec_of(save_adapter(tmp_path / "adapter", base)))
    with adapters_off(policy.model):
        off = logps_of(policy)
    on = logps_of(policy)
    graphs = compile_layers(decoder_layers(policy.model), backend="eager")
    for _ in range(2):
        torch.testing.assert_close(logps_of(policy), on)
        with adapters_off(policy.model):
            torch.testing.assert_close(logps_of(policy), off)
    assert graphs


# --- read ------------------------------------------------------------------------------------------------------------


def test_tied_tensors_of_a_file_must_be_equal(world: World, tmp_path: Path) -> None:
    """peft writes embedding and head of a tied model both."""
    base = save_model(tmp_path / "base", "llama-tied")
    adapter = save_adapter(tmp_path / "adapter", base, embeddings=True)
    tensors = load_file(adapter / ADAPTER_TENSORS)
    embedding, head = (f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head"))
    assert {embedding, head} <= set(tensors)
    load(world, base, spec_of(adapter, embeddings=True))
    save_file({name: tensor for name, tensor in tensors.items() if name != embedding}, adapter / ADAPTER_TENSORS)
    policy = load(world, base, spec_of(adapter, embeddings=True))
    assert torch.equal(trained_tensors(policy.model)[embedding].full_tensor(), tensors[head])
    save_file(tensors | {head: tensors[head] + 1}, adapter / ADAPTER_TENSORS)
    with pytest.raises(UserError, match=r"embed_tokens\.weight differs from .*lm_head\.weight, which the model ties"):
        load(world, base, spec_of(adapter, embeddings=True))


def other_files(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What is wrong with a file -> its tensors."""
    tensors = load_file(folder / ADAPTER_TENSORS)
    first, *others = sorted(tensors)
    return {
        "1 tensors of the adapters are missing, the first is": {name: tensors[name] for name in others},
        "1 tensors fit no adapter of the model, the first is": tensors | {"more": torch.zeros(1)},
        "has shape": tensors | {first: torch.zeros(2, 2)},
    }


def test_a_file_that_does_not_fit_is_refused(world: World, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    for message, tensors in other_files(adapter).items():
        save_file(tensors, adapter / ADAPTER_TENSORS)
        with pytest.raises(UserError, match=message):
            load(world, base, spec_of(adapter))
    (adapter / ADAPTER_TENSORS).write_bytes(b"{}")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load(world, base, spec_of(adapter))


def test_dora_needs_norms_that_are_not_zero(world: World, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] = 0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"an output of model\.layers\.1\.mlp\.up_proj has only weights of 0"):
        load(world, base, AdapterSpec(2, 4.0, dora=True))
    load(world, base, AdapterSpec(2, 4.0, dora=True, exclude_modules=("up_proj",)))


# --- the key of the reference ----------------------------------------------------------------------------------------


def test_what_changes_the_key_of_a_start(tmp_path: Path) -> None:
    """The base, a number of a tensor, and each factor alone; not the place, nor the order of names."""
    base = save_model(tmp_path / "base", "llama")
    spec = spec_of(save_adapter(tmp_path / "adapter", base))
    key = start_hash("base", spec)
    assert key != "base"
    moved = shutil.copytree(spec.folder, tmp_path / "moved")
    same = {"folder": moved, "target_modules": ("v_proj", "q_proj"), "alpha": 5}
    assert start_hash("base", replace(spec, **same)) == key
    changes: list[dict[str, Any]] = [
        {"rank": 4},
        {"alpha": 6.0},
        {"rank_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"q_proj": 9.0}},
        {"rslora": True},
        {"dora": True},
    ]
    others = [start_hash("base", replace(spec, **change)) for change in changes]
    tensors = load_file(moved / ADAPTER_TENSORS)
    next(tensor for name, tensor in tensors.items() if "lora_A" in name).view(torch.int32)[0, 0] ^= 1
    save_file(tensors, moved / ADAPTER_TENSORS)
    others += [start_hash("other base", spec), start_hash("base", replace(spec, folder=moved))]
    assert len({key, *others}) == 1 + len(others)


def test_a_start_without_effect_is_the_base(tmp_path: Path) -> None:
    """B = 0 has none; with DoRA, or with embeddings, nothing is taken for granted."""
    base = save_model(tmp_path / "base", "llama")
    assert start_hash("base", spec_of(None, dora=True)) == "base"
    assert start_hash("base", spec_of(save_adapter(tmp_path / "plain", base, spread=0.0))) == "base"
    dora = spec_of(save_adapter(tmp_path / "dora", base, spread=0.0, use_dora=True), dora=True)
    embeddings = spec_of(save_adapter(tmp_path / "whole", base, spread=0.0, embeddings=True), embeddings=True)
    assert "base" not in (start_hash("base", dora), start_hash("base", embeddings))
