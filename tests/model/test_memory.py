"""The memory of one forward and backward pass: bytes that live at once, counted as they are made."""

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dpo.batch.costs import CostModel
from dpo.batch.layout import make_layout
from dpo.batch.packing import PackedBatch, RowFormat, pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.model.attention import ATTENTION, register_attention, segment_attention
from dpo.model.policy import _forward_logps
from dpo.pairs.pair_set import Pair
from tests.support.live_bytes import LiveBytes, allocated_peak

HIDDEN, MIB = 32, 2**20
HEAD_BYTES = 4 * MIB
CPU = torch.device("cpu")


def small_llama(vocab_size: int, tied: bool = True) -> PreTrainedModel:
    """Two layers of width 32, unsharded: every tensor of a weight's or a gradient's bytes has the shape of a weight."""
    register_attention()
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)


def packed_batch(num_pairs: int = 8) -> PackedBatch:
    """Pairs with prompts of 60 and completions of 20 and 30 tokens: 880 tokens, 400 of them predicted."""
    rng = np.random.default_rng(0)
    pairs = [Pair(*(rng.integers(3, 1000, n).astype(np.int32) for n in (60, 20, 30))) for _ in range(num_pairs)]
    plan = plan_step(grow_trees(pairs), 1, 10**6, CostModel())
    return pack(plan.micro_batches[0][0], plan, lambda *_: -100.0, RowFormat((None,), CPU))


def peak_of(model: PreTrainedModel, work: Callable[[], Tensor]) -> int:
    """The most bytes at once while `work` runs forward and backward, weights and their gradients left out."""
    with LiveBytes(apart={parameter.shape for parameter in model.parameters()}) as live:
        work().sum().backward()
    return live.peak


def policy_peak(vocab_size: int, head_bytes: int = HEAD_BYTES, tied: bool = True) -> int:
    model, batch = small_llama(vocab_size, tied), packed_batch()
    return peak_of(model, lambda: _forward_logps(model, batch, head_bytes))


def test_activations_do_not_grow_with_the_vocabulary() -> None:
    """From 16k to 128k, weights and their gradients apart: less than 10 % more, though a row of logits takes eight
    times as much. With full logits, 400 rows of 512 KiB, it would be a multiple: the meter does see them.
    """
    small, large = policy_peak(2**14), policy_peak(2**17)
    assert large <= 1.10 * small
    assert policy_peak(2**17, head_bytes=2**40) > 5 * large


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_takes_its_budget_and_no_more(tied: bool) -> None:
    """The peak is the body's own, the budget, and ten tensors of (rows x hidden size)."""
    vocab_size = 2**15
    model, batch = small_llama(vocab_size, tied), packed_batch()
    body = peak_of(
        model,
        lambda: (
            model.base_model(
                input_ids=batch.tokens[None], position_ids=batch.positions[None], layout=batch.layout, use_cache=False
            ).last_hidden_state
        ),
    )
    assert policy_peak(vocab_size, tied=tied) <= body + HEAD_BYTES + 10 * len(batch.predict_idxs) * HIDDEN * 4


@pytest.mark.parametrize("tied", [True, False])
def test_of_the_weights_shape_there_are_gradients_alone(tied: bool) -> None:
    """(V, H) at a vocabulary of 128k, in fifty chunks: the embedding's gradient and the head's, by the allocator's
    count, since autograd adds gradients in place only where nobody looks on.
    """
    vocab_size = 2**17
    model, batch = small_llama(vocab_size, tied), packed_batch()
    peak = allocated_peak(lambda: _forward_logps(model, batch, HEAD_BYTES).sum().backward())
    assert peak <= 2 * vocab_size * HIDDEN * 4 + policy_peak(vocab_size, tied=tied)


@pytest.mark.parametrize("window", [None, 16])
def test_attention_makes_bytes_by_the_token(window: int | None) -> None:
    """Four times the trees take four times the bytes in forward and backward, not sixteen times: no tensor as long as
    the row is made for each segment.
    """

    def bytes_made(num_pairs: int) -> int:
        batch = packed_batch(num_pairs)
        layout = make_layout(batch.layout.spans, [window], len(batch.tokens), CPU)
        query, key, value = (torch.randn(1, heads, len(batch.tokens), 8, requires_grad=True) for heads in (4, 2, 2))
        with LiveBytes() as live:
            segment_attention(query, key, value, layout, window, None).sum().backward()
        return live.made

    assert bytes_made(32) <= 4.1 * bytes_made(8)


def test_garbage_that_is_freed_meanwhile_hides_no_peak() -> None:
    """A measurement that leaves 4 MiB in a cycle; then one of 1 MiB, in the middle of which a collection frees them."""

    def leave_garbage() -> None:
        cycle: list[object] = [torch.ones(MIB)]
        cycle.append(cycle)

    def work() -> Tensor:
        gc.collect()
        return torch.ones(MIB // 4)

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        assert allocated_peak(leave_garbage) == 4 * MIB
        assert allocated_peak(work) == MIB
    finally:
        if was_enabled:
            gc.enable()
