"""What an answer's tokens share: layers that are gathered once where memory allows, and no plan of cuDNN's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from dpo.batch.costs import CostModel
from dpo.batch.packing import PackedBatch, RowFormat, pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.distributed.startup import open_world
from dpo.distributed.world import World
from dpo.machine.facts import host_memory
from dpo.model import generation
from dpo.model.generation import AnswerRule, _free_bytes, cached_elements, generate, keeps_layers_whole
from dpo.model.parallelize import decoder_layers
from dpo.model.policy import Policy, completion_logps
from tests.model.test_generation import PROMPTS, load, plain_greedy, some_pairs
from tests.support.models import VOCAB, plain_model, save_model


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.parametrize(
    ("layers", "cache", "free", "keeps"),
    [(6, 2, 10, True), (6, 3, 10, False), (0, 0, 0, True), (0, None, 10, False)],
)
def test_layers_are_kept_where_they_fit(layers: int, cache: int | None, free: int, keeps: bool) -> None:
    """Beside the KV cache, whose size must be known, in four fifths of what is free."""
    assert keeps_layers_whole(layers, cache, free) == keeps


def test_what_is_free_is_what_programs_could_still_have(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """MemAvailable, which counts the caches of files too, divided by the ranks of the machine."""
    text = "MemTotal:       4000 kB\nMemFree:         100 kB\nMemAvailable:   2000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text if path == Path("/proc/meminfo") else "")
    assert host_memory() == (2000 * 1024, 4000 * 1024)
    assert _free_bytes(replace(world, local_size=4)) == 500 * 1024


# --- how much a cache takes ------------------------------------------------------------------------------------------

_TINY = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_GATED = {**_TINY, "intermediate_size": 48, "num_key_value_heads": 2}
CACHES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": (_GATED, 2 * 3 * 2 * 8),
    "qwen3": ({**_GATED, "head_dim": 16}, 2 * 3 * 2 * 16),
    "gemma3_text": ({**_GATED, "head_dim": 16, "sliding_window": 4}, 2 * 3 * 2 * 16),
    "mistral": ({**_GATED, "sliding_window": 4}, 2 * 3 * 2 * 8),
    "gpt_neox": ({**_TINY, "intermediate_size": 48}, 2 * 3 * 4 * 8),
    "gpt2": ({"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4}, 2 * 3 * 4 * 8),
    "opt": ({**_TINY, "ffn_dim": 48, "word_embed_proj_dim": 32}, 2 * 3 * 4 * 8),
    "phi": ({**_GATED}, 2 * 3 * 2 * 8),
    "gpt_bigcode": ({"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4}, 2 * 3 * 1 * 8),
    "falcon": ({**_TINY, "num_kv_heads": 2, "new_decoder_architecture": True}, 2 * 3 * 4 * 8),
}
"""Of each type of model a config, and the numbers that it caches for a token: keys and values x layers x heads x
width. Falcon's keys are repeated for all heads before they are cached.
"""


@pytest.mark.parametrize("kind", CACHES)
def test_the_cache_is_what_transformers_keeps(kind: str) -> None:
    """5 tokens in transformers' own cache; with a window of 4 its layers keep 3 of them until the next."""
    facts, numbers = CACHES[kind]
    config = AutoConfig.for_model(kind, **facts, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cached_elements(config) == numbers
    assert (kept < 5 * numbers) if "sliding_window" in facts else (kept == 5 * numbers)


@pytest.mark.parametrize("kind", ["deepseek_v3", "minicpm3", "gemma4_text", "gemma3", "mamba", "rwkv", "llama4", "blt"])
def test_a_cache_of_another_kind_is_not_known(kind: str) -> None:
    """Latent attention, heads by layer, a config of several models, a recurrent state: layers are gathered anew for
    every token, and nothing is raised.
    """
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    assert cached_elements(AutoConfig.for_model(kind)) is None


# --- seen in the middle of it ----------------------------------------------------------------------------------------


@contextmanager
def seen_while_answering(policy: Policy, free: int) -> Iterator[list[tuple[bool, bool]]]:
    """With so many bytes free: after each forward pass, whether the layers are whole, and cuDNN's attention is on."""
    seen: list[tuple[bool, bool]] = []

    def look(*args: Any) -> None:
        seen.append((layers_are_whole(policy), torch.backends.cuda.cudnn_sdp_enabled()))

    handle = policy.model.register_forward_hook(look)
    with patch.object(generation, "_free_bytes", lambda world: free):
        yield seen
    handle.remove()


def layers_are_whole(policy: Policy) -> bool:
    """Whether all parameters of all layers are gathered; none is, where not all are."""
    (are_whole,) = {
        not isinstance(parameter, DTensor) for layer in decoder_layers(policy.model) for parameter in layer.parameters()
    }
    return are_whole


def batch_of(policy: Policy) -> PackedBatch:
    plan = plan_step(grow_trees(some_pairs()), 1, 1000, CostModel())
    return pack(plan.micro_batches[0][0], plan, lambda *_: -5.0, RowFormat(policy.windows, policy.device))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("free", [0, 10**12])
def test_layers_are_whole_for_all_tokens_and_then_as_before(
    free: int, reshard: bool, fails: bool, world: World, folder: Path
) -> None:
    """Where memory allows, or where the config has it so; afterwards, also after a failure in the second token, a
    forward pass leaves the layers as the config has it.
    """
    policy = load(world, folder, reshard_after_forward=reshard)
    expected = [plain_greedy(plain_model(folder), prompt, 3) for prompt in PROMPTS]
    with seen_while_answering(policy, free) as seen:
        if fails:
            answers_with_failure(policy, world)
        else:
            assert generate(policy, PROMPTS, AnswerRule((), 3, 0.0, 0), world) == expected
    assert {whole for whole, _ in seen} == {free > 0 or not reshard}
    assert not layers_are_whole(policy)
    with torch.no_grad():
        completion_logps(policy, batch_of(policy))
    assert layers_are_whole(policy) != reshard


def answers_with_failure(policy: Policy, world: World) -> None:
    """Answers that end in a failure in the head, at the second token."""
    calls: list[None] = []

    def second(*args: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    handle = policy.model.get_output_embeddings().register_forward_pre_hook(second)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(policy, PROMPTS, AnswerRule((), 5, 1.0, 11), world)
    handle.remove()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("is_on", [True, False])
def test_cudnn_is_off_for_all_tokens_and_then_as_before(is_on: bool, fails: bool, world: World, folder: Path) -> None:
    """It would make a plan for every length; the user's own choice comes back, also after a failure."""
    policy, before = load(world, folder), torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(is_on)
    try:
        with seen_while_answering(policy, 10**12) as seen:
            if fails:
                answers_with_failure(policy, world)
            else:
                generate(policy, PROMPTS, AnswerRule((), 3, 0.0, 0), world)
        assert {cudnn for _, cudnn in seen} == {False}
        assert torch.backends.cuda.cudnn_sdp_enabled() == is_on
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
