"""What is computed on CUDA is what plain Hugging Face computes on a CPU, in float32 and within bfloat16."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpo.batch.block_mask import Span, Window, host_mask
from dpo.batch.layout import make_layout
from dpo.batch.packing import padded_length
from dpo.distributed.world import World
from dpo.model.attention import block_attention, segment_attention
from tests.gpu.conftest import CUDA_ALONE
from tests.model.test_policy import assert_equal, load, oracle, run
from tests.support.models import FAMILIES, VOCAB, save_model

TOLERANCE = 1e-4
"""Of log-probabilities and of each gradient in the L2 norm, float32, other kernels on either side: a wrong mask is off
by more than a tenth."""
CPU = torch.device("cpu")


def save_wide(folder: Path, head_dim: int) -> Path:
    """A Llama with heads of a width that kernels are made for; two of queries for each of keys and values."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 4 * head_dim, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, num_key_value_heads=2, **sizes, **ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, world: World, tmp_path: Path) -> None:
    """Log-probabilities and every gradient, in two rows of 256 tokens; Mistral's window is shorter than a prompt."""
    folder = save_model(tmp_path, family)
    policy = load(world, folder, compute_dtype="float32")
    assert_equal(run(policy, budget=1, row_length=padded_length), oracle(folder), TOLERANCE)


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=CUDA_ALONE)])
def test_wide_heads(head_dim: int, world: World, tmp_path: Path) -> None:
    folder = save_wide(tmp_path, head_dim)
    policy = load(world, folder, compute_dtype="float32")
    assert_equal(run(policy, row_length=padded_length), oracle(folder), TOLERANCE)


@pytest.mark.parametrize("family", [*(pytest.param(f, marks=CUDA_ALONE) for f in ("llama", "gpt2")), "llama-tied"])
def test_the_chunked_head(family: str, world: World, tmp_path: Path) -> None:
    """Three rows of logits at a time."""
    folder = save_model(tmp_path, family)
    policy = load(world, folder, compute_dtype="float32")
    assert_equal(run(policy, head_bytes=3 * VOCAB * 4, row_length=padded_length), oracle(folder), TOLERANCE)


OPTIONS: dict[str, dict[str, Any]] = {
    "full checkpointing": {"activation_checkpointing": "full"},
    "selective checkpointing": {"activation_checkpointing": "selective"},
    "compiled": {"compile": True},
    "compiled, full checkpointing": {"compile": True, "activation_checkpointing": "full"},
    "compiled, selective checkpointing": {"compile": True, "activation_checkpointing": "selective"},
    "weights on the host": {"cpu_offload": True},
    "weights kept after the forward pass": {"reshard_after_forward": False},
    "reduced on every micro-batch": {"sync_gradients": "every_micro_batch"},
}


SHARDING = list(OPTIONS)[5:]
"""Options that do the same on a CPU where nothing is emulated: tests/layouts/test_parallel.py."""


@pytest.mark.parametrize(
    "option", [pytest.param(o, marks=CUDA_ALONE) if o in SHARDING else o for o in OPTIONS], ids=list(OPTIONS)
)
def test_options(option: str, world: World, tmp_path: Path) -> None:
    """Keys of `parallel` that change how, not what."""
    folder = save_model(tmp_path, "mistral")
    policy = load(world, folder, compute_dtype="float32", **OPTIONS[option])
    assert_equal(run(policy, budget=1, row_length=padded_length), oracle(folder), TOLERANCE)


@pytest.mark.parametrize(
    "family", [*(pytest.param(f, marks=CUDA_ALONE) for f in ("llama", "gpt2")), "gpt-neox", "mistral"]
)
def test_bfloat16(family: str, world: World, tmp_path: Path) -> None:
    """What `auto` computes in on CUDA: log-probabilities within 0.05 sqrt(tokens), but not those of float32; gradients
    in float32, each within 10 %.
    """
    folder = save_model(tmp_path, family)
    policy = load(world, folder, compute_dtype="bfloat16")
    (logps, gradients), (wanted, wanted_gradients) = run(policy, row_length=padded_length), oracle(folder)
    for name, value in logps.items():
        num_tokens = len(name.split(b"|")[-1]) // 4
        assert 0 < abs(value - wanted[name]) <= 0.05 * num_tokens**0.5
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted_gradients[name]).norm() <= 0.1 * wanted_gradients[name].norm(), name


def random_row(num_tokens: int, seed: int) -> list[Span]:
    """Trees with prompts of up to 300 tokens and 1 to 4 completions of up to 200, as many as fit."""
    rng, spans, place = np.random.default_rng(seed), [], 0
    while True:
        span = Span(place, int(rng.integers(1, 300)), tuple(rng.integers(1, 200, rng.integers(1, 5)).tolist()))
        if place + span.num_tokens > num_tokens:
            return spans
        spans.append(span)
        place += span.num_tokens


@pytest.mark.parametrize("window", [None, 50, 300])
@pytest.mark.parametrize(
    ("kv_heads", "width"), [pytest.param(4, 16, marks=CUDA_ALONE), (2, 64), pytest.param(1, 8, marks=CUDA_ALONE)]
)
def test_rows_of_many_blocks(window: Window, kv_heads: int, width: int, device: torch.device) -> None:
    """1,024 tokens in 8 x 8 blocks, empty, full and in between, some of them padding: values and gradients are those
    of the loop over segments.
    """
    random = torch.Generator().manual_seed(width)
    shapes = [(1, heads, 1024, width) for heads in (4, kv_heads, kv_heads)]
    row = [torch.randn(shape, generator=random) for shape in shapes]
    direction = torch.randn(shapes[0], generator=random)
    layout = make_layout(random_row(1024, seed=width), [window], 1024, CPU)
    mask = host_mask(layout.spans, window, pin=device.type == "cuda").to(device)
    assert mask.full_kv_num_blocks.any() or window == 50

    def outcome(attend: Any, *row: Tensor) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in row]
        output = attend(*leaves)
        return [output, *torch.autograd.grad(output, leaves, direction.to(output.device))]

    found = outcome(lambda *qkv: block_attention(*qkv, mask, None), *(x.detach().to(device) for x in row))
    wanted = outcome(lambda *qkv: segment_attention(*qkv, layout, window, None), *row)
    for one, other in zip(found, wanted, strict=True):
        assert (one.cpu() - other).norm() <= TOLERANCE * other.norm()
