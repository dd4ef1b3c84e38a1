"""A frozen base of four bits: bytes against the paper's definition, the policy against peft on the dequantized base."""

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from dpo.adapters import nf4
from dpo.adapters.nf4 import VALUES, dequantize, num_bytes, quantize
from dpo.adapters.nf4_linear import NF4Linear, own_bytes
from dpo.adapters.quantized import base_alone, quantize_layers, quantized_layers, stored_hash
from dpo.adapters.start import start_adapters, start_hash
from dpo.adapters.switch import adapters_off
from dpo.base.errors import UserError
from dpo.batch.costs import cost_model
from dpo.batch.packing import pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.distributed.startup import open_world
from dpo.distributed.world import World
from dpo.model.build import build_on_meta, merged_tensors
from dpo.model.nf4_reading import QuantizingPlanner
from dpo.model.policy import Policy, completion_logps
from tests.adapters.test_oracle import assert_equal, load, oracle, run, some_pairs
from tests.model.test_policy import rms_norm_without_cast
from tests.support.live_bytes import LiveBytes
from tests.support.models import family_config, plain_model, save_model
from tests.support.nf4 import QUANTIZED, dequantized_base, normal_values, plain_nf4
from tests.support.peft_models import plain_peft, save_adapter, spec_of

TABLE = VALUES.numpy()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


def packed(rows: Tensor) -> Tensor:
    out = torch.empty(len(rows), num_bytes(rows.shape[1]), dtype=torch.uint8)
    quantize(rows, out)
    return out


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_the_values_are_quantiles_of_the_normal_distribution() -> None:
    """The paper's figures were rounded from another library's quantiles."""
    assert VALUES.tolist() == pytest.approx(normal_values(), abs=5e-7)


def test_hand_derived_bytes() -> None:
    """Scales 0.5 = 0x3F000000, 2 = 0x40000000 and 0. 0.7229568 and 1 meet at 0.8614784; 0.4 / 0.5 is below, 0.45 / 0.5
    above. Of a row of 66 weights the last two have their own block.
    """
    one = packed(torch.tensor([[0.5, -0.1]]))
    assert bytes(one[0].tolist()) == b"\xf5" + b"\x77" * 31 + b"\0\0\0\x3f"
    two = packed(torch.tensor([[0.5, -0.5, 0.4, 0.45, *[0.0] * 60, 0.0, -2.0]]))
    assert bytes(two[0].tolist()) == b"\xf0\xef" + b"\x77" * 30 + b"\x70" + b"\x77" * 31 + b"\0\0\0\x3f\0\0\0\x40"
    none = packed(torch.zeros(1, 64))
    assert bytes(none[0].tolist()) == b"\x77" * 32 + bytes(4)
    assert dequantize(two, 66, torch.float64)[0, [0, 1, 3, 4, 64, 65]].tolist() == [0.5, -0.5, 0.5, 0, 0, -2]


def test_a_weight_in_the_middle_has_the_lower_value() -> None:
    middle = (VALUES[3] + VALUES[4]) / 2
    above = torch.nextafter(middle, torch.tensor(1.0))
    assert packed(torch.stack([torch.tensor(1.0), middle, above, -above])[None])[0, :2].tolist() == [0xF3, 0x4B]


@pytest.mark.parametrize("columns", [1, 48, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_the_papers(columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights of four magnitudes, and a row of zeros; quantized a few rows at a time."""
    torch.manual_seed(0)
    rows = (torch.randn(9, columns) * torch.logspace(-4, 2, 9)[:, None]).to(dtype)
    rows[4] = 0
    codes, scales, weights = plain_nf4(rows.float().numpy(), TABLE)
    monkeypatch.setattr(nf4, "_AT_ONCE", 2 * columns + 1)
    found, blocks = packed(rows), -(-columns // 64)
    halves = torch.stack([found[:, : 32 * blocks] >> 4, found[:, : 32 * blocks] & 15], -1).view(9, -1)
    assert halves[:, :columns].tolist() == codes.tolist()
    assert found[:, 32 * blocks :].contiguous().view(torch.float32).tolist() == scales.tolist()
    assert torch.equal(dequantize(found, columns, torch.float32), torch.from_numpy(weights))
    assert torch.equal(dequantize(found, columns, torch.bfloat16), torch.from_numpy(weights).bfloat16())
    assert torch.equal(packed(rows[3:7]), found[3:7])


# --- layers ----------------------------------------------------------------------------------------------------------


def some_layer(transposed: bool, bias: bool = True) -> tuple[NF4Linear, Tensor]:
    """A layer of 80 inputs and 48 outputs, and its dequantized weight, (outputs, inputs)."""
    torch.manual_seed(1)
    plain = Conv1D(48, 80) if transposed else nn.Linear(80, 48, bias=bias)
    plain.weight.requires_grad_(False)
    layer = NF4Linear(plain, torch.float64, transposed)
    quantize(plain.weight, own_bytes(layer))
    weight = torch.from_numpy(plain_nf4(plain.weight.numpy(), TABLE)[2]).double()
    layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.double())
    return layer, weight.T if transposed else weight


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_is_a_product_with_the_dequantized_weight(transposed: bool) -> None:
    layer, weight = some_layer(transposed)
    x = torch.randn(1, 7, 80, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert torch.allclose(out, x @ weight.T + layer.bias, rtol=1e-14, atol=1e-14)
    assert torch.equal(layer.weight, weight.T if transposed else weight)
    torch.manual_seed(2)
    slope = torch.randn_like(out)
    out.backward(slope)
    assert x.grad is not None and torch.allclose(x.grad, slope @ weight, rtol=1e-14, atol=1e-14)
    assert layer.bias.grad is not None and layer.packed.grad is None


@pytest.mark.parametrize("transposed", [False, True])
def test_the_backward_pass_keeps_the_bytes_alone(transposed: bool) -> None:
    """After the forward pass there is its result, and nothing else; what is saved is the parameter, and a table."""
    layer, _ = some_layer(transposed)
    x, saved = torch.randn(7, 80, dtype=torch.float64, requires_grad=True), list[Tensor]()
    with LiveBytes() as live, saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = layer(x)
        assert live.now == out.numel() * 8
    assert {tensor.data_ptr() for tensor in saved} == {layer.packed.data_ptr(), layer.pairs.data_ptr()}
    assert own_bytes(layer).shape == ((80, 40) if transposed else (48, 72))  # of float64, 8 bytes each


WHICH = {
    "llama": ["gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt-neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


@pytest.mark.parametrize("family", WHICH)
def test_linear_layers_of_decoder_layers_are_quantized(family: str, world: World, tmp_path: Path) -> None:
    """Those without adapters too; not embeddings, head, norms and biases."""
    base = save_model(tmp_path, family)
    spec = spec_of(None, target_modules=(WHICH[family][0],), quantize="nf4")
    policy = load(world, base, spec)
    names = list(quantized_layers(policy.model))
    assert {name.split(".")[-2] for name in names} == set(WHICH[family])
    assert sorted(names) == sorted(name for name, _ in plain_model(base).named_parameters() if QUANTIZED.search(name))
    assert sum(name.endswith(".packed") for name, _ in policy.model.named_parameters()) == len(names)


def test_routers_and_experts_are_not_quantized() -> None:
    """Of Qwen2-MoE, whose shared expert has dense layers, and a gate that is a linear layer."""
    facts = {"num_experts": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 48, "vocab_size": 97}
    model = build_on_meta(AutoConfig.for_model("qwen2_moe", **facts, **sizes), torch.float32, False)
    model.requires_grad_(False)
    quantize_layers(model, spec_of(None, quantize="nf4"), torch.float32)
    assert sorted(name.split(".", 3)[-1].removesuffix(".weight") for name in quantized_layers(model)) == [
        "mlp.shared_expert.down_proj",
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ]


def test_what_is_trained_whole_is_not_quantized(world: World, tmp_path: Path) -> None:
    base = save_model(tmp_path, "llama")
    spec = spec_of(None, target_modules=("q_proj",), trained_modules=("o_proj",), quantize="nf4")
    assert not any("o_proj" in name for name in quantized_layers(load(world, base, spec).model))


def test_refusals() -> None:
    model = build_on_meta(family_config("llama"), torch.float32, False)
    with pytest.raises(UserError, match=r"lora\.quantize: an adapter for the parameter experts\.down_proj needs"):
        quantize_layers(model, spec_of(None, quantize="nf4", target_parameters=("experts.down_proj",)), torch.float32)
    with pytest.raises(UserError, match=r"lora\.quantize: llama models have no linear layer in a decoder layer"):
        quantize_layers(model, spec_of(None, quantize="nf4"), torch.float32)  # all of whose weights are trained


# --- the policy ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm_without_cast)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama-tied", {"dora": True}),
    ("gpt2", {"dora": True}),
    ("gpt-neox", {"rslora": True}),
]


@pytest.mark.usefixtures("_no_casts")
@pytest.mark.parametrize(("family", "keys"), KINDS)
def test_the_policy_is_pefts_on_the_dequantized_base(
    family: str, keys: dict[str, Any], world: World, tmp_path: Path
) -> None:
    """Log-probabilities and gradients in float64, 1e-9: with B that is not 0, magnitudes that are trained."""
    base = save_model(tmp_path / "base", family)
    adapter = save_adapter(tmp_path / "adapter", base, **{f"use_{name}": value for name, value in keys.items()})
    policy = load(world, base, spec_of(adapter, quantize="nf4", **keys))
    other = dequantized_base(base, tmp_path / "other", TABLE)
    assert_equal(run(policy), oracle(plain_peft(other, adapter, torch.float64)))


@pytest.mark.parametrize(("family", "keys"), [("llama", {}), ("llama", {"dora": True}), ("gpt2", {"dora": True})])
def test_merged_weights_are_those_of_the_dequantized_base(
    family: str, keys: dict[str, Any], world: World, tmp_path: Path
) -> None:
    """As peft merges them; layers without adapters are dequantized too."""
    base, one = save_model(tmp_path / "base", family), WHICH[family][:1]
    use = {f"use_{name}": value for name, value in keys.items()}
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=one, **use)
    policy = load(world, base, spec_of(adapter, target_modules=tuple(one), quantize="nf4", **keys), "float32")
    other = dequantized_base(base, tmp_path / "other", TABLE)
    expected = plain_peft(other, adapter, torch.float32).merge_and_unload().state_dict()
    merged = merged_tensors(policy)
    assert len(merged) >= 20
    for name, tensor in merged.items():
        assert torch.allclose(tensor.full_tensor(), expected[name], rtol=1e-6, atol=1e-6), name


def test_magnitudes_start_as_norms_of_the_dequantized_base(world: World, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    policy = load(world, base, spec_of(None, dora=True, quantize="nf4"), "float32")
    start_adapters(policy.model, 3)
    expected = plain_model(dequantized_base(base, tmp_path / "other", TABLE)).model.layers[1].mlp.down_proj.weight
    magnitude = policy.model.model.layers[1].mlp.down_proj.lora_magnitude_vector["default"].weight
    assert torch.allclose(magnitude.full_tensor(), expected.norm(dim=1), rtol=1e-6)


def test_one_tensor_is_in_full_precision_at_a_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, sizes = weakref.WeakSet[Tensor](), list[int]()
    plain = QuantizingPlanner.resolve_tensor

    def resolve(self: QuantizingPlanner, item: Any) -> Tensor:
        rows = plain(self, item)
        if item.dest_index.fqn in self.layers:
            assert not list(alive)
            alive.add(rows)
            sizes.append(rows.numel())
        return rows

    monkeypatch.setattr(QuantizingPlanner, "resolve_tensor", resolve)
    gc.disable()
    try:
        load(world, save_model(tmp_path, "llama"), spec_of(None, quantize="nf4"), "float32")
    finally:
        gc.enable()
    assert len(sizes) == 14 and max(sizes) == 32 * 48


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_casts")
def test_the_base_alone_is_the_policy_without_adapters(world: World, tmp_path: Path) -> None:
    """To the last bit: whether the rows of a reference come from a run with adapters or from a program without."""
    base = save_model(tmp_path / "base", "llama")
    spec = spec_of(save_adapter(tmp_path / "adapter", base), quantize="nf4")
    policy, alone = load(world, base, spec), load(world, base, base_alone(spec))
    assert not [name for name, _ in alone.model.named_parameters() if "lora" in name]
    with adapters_off(policy.model), torch.no_grad():
        one = logps(policy)
    with torch.no_grad():
        two = logps(alone)
    assert torch.equal(one, two)


def logps(policy: Policy) -> Tensor:
    plan = plan_step(grow_trees(some_pairs()), 1, 10_000, cost_model(policy.config))
    return completion_logps(policy, pack(plan.micro_batches[0][0], plan, lambda *_: 0.0, policy.row_format))


def test_every_base_has_its_own_key() -> None:
    """By its content, whether it is quantized, and what is trained whole, which is not."""
    plain, quantized = spec_of(None), spec_of(None, quantize="nf4")
    part = spec_of(None, quantize="nf4", trained_modules=("o_proj",))
    assert stored_hash("a", plain) == start_hash("a", plain) == "a"
    keys = [stored_hash(content, spec) for content, spec in itertools.product("ab", (plain, quantized, part))]
    assert len(set(keys)) == 6
    assert start_hash("a", quantized) == stored_hash("a", quantized) == stored_hash("a", base_alone(quantized))
    assert stored_hash("a", part) == stored_hash("a", base_alone(part))


def test_adapters_with_an_effect_have_another_key_on_a_quantized_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    effect, none = (save_adapter(tmp_path / f"{spread}", base, spread=spread) for spread in (0.3, 0.0))
    stored = stored_hash("a", spec_of(none, quantize="nf4"))
    assert start_hash("a", spec_of(none, quantize="nf4")) == stored != "a"
    assert len({start_hash("a", spec_of(effect, quantize="nf4")), start_hash("a", spec_of(effect)), stored, "a"}) == 4
