"""Generates answers with a sharded policy: all ranks call transformers' `generate` with the same number of forwards.

An answer is greedy, or drawn from the plain softmax at a temperature. A draw is a function of (seed, prompt, place in
the answer) and uses no random generator. An answer therefore depends on the number of ranks and on the other prompts
only through the rounding of logits.

Prompts are answered in waves. An example: 2 lanes, 2 rows per lane (instead of `ROWS_PER_LANE`), at most 8 new tokens,
and a model with 16 learned positions:

    prompt             0   1   2   3   4   5
    its tokens         4   6  13   5   8  16
    limit              8   8   3   8   8   0    no position is left for an answer to prompt 5, which is empty

    wave   limit   lane 0        lane 1
    1      8       prompts 0, 3  prompts 1, 4
    2      3       prompt 2      prompt 2 too: its forward passes join the all-gathers, its answer is dropped
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, LogitsProcessorList, PretrainedConfig

from dpo.distributed.collectives import all_gather, gather_lanes
from dpo.distributed.world import World
from dpo.encode.coder import Ids
from dpo.machine.facts import host_memory
from dpo.model.parallelize import compute_dtype, decoder_layers
from dpo.model.policy import Policy, reshard
from dpo.pairs.tokens import limits_of
from dpo.terminal.console import say

ROWS_PER_LANE = 8
"""Prompts that a lane answers at a time; each has a KV cache."""


@dataclass(frozen=True)
class AnswerRule:
    """The options of generation."""

    eos_ids: tuple[int, ...]
    """Tokens that end an answer."""
    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most probable token at each place; above 0, tokens are drawn from the softmax at this temperature."""
    seed: int = 0


def generate(policy: Policy, prompts: Sequence[Sequence[int]], rule: AnswerRule, world: World) -> list[Ids]:
    """Returns the answer to each prompt: the ids after the prompt, without EOS.

    An answer ends before `max_new_tokens` where the model's learned positions end; rank 0 prints a line. Every rank
    must get here with the same prompts, or the rest hang; every rank gets all answers. The state of training does not
    change.

    Args:
        policy: the sharded model.
        prompts: token ids, at least one per prompt.
        rule: the options of generation.
        world: the ranks.
    """
    max_new_tokens = rule.max_new_tokens
    limits = [_room(policy, len(prompt), max_new_tokens) for prompt in prompts]
    if world.is_main and min(limits, default=max_new_tokens) < max_new_tokens:
        num_cut = sum(limit < max_new_tokens for limit in limits)
        say(f"{num_cut} answers end before {max_new_tokens} tokens, where the model's positions end")
    answers: list[Ids] = [[] for _ in prompts]
    cache_bytes = _cache_bytes(policy, max(map(len, prompts), default=0) + max_new_tokens)
    # All ranks must decide alike: a rank that keeps its layers would not join the all-gathers of the others.
    keeps = all(all_gather(keeps_layers_whole(_layer_bytes(policy), cache_bytes, _free_bytes(world))))
    with _generating(policy, keeps):
        for numbers, limit in _waves(limits, world.num_lanes * ROWS_PER_LANE):
            own_numbers = numbers[world.lane :: world.num_lanes]
            own_prompts = [prompts[i] for i in own_numbers or numbers[:1]]  # a lane without a prompt runs the first
            own_answers = _answer_rows(policy, own_prompts, rule, limit, world)[: len(own_numbers)]
            for number, answer in itertools.chain(*gather_lanes(list(zip(own_numbers, own_answers, strict=True)))):
                answers[number] = answer
    return answers


def _room(policy: Policy, prompt_length: int, max_new_tokens: int) -> int:
    """Returns how many tokens may follow a prompt of this length."""
    limits = limits_of(None, None, policy.config)
    if not limits.positions_are_hard or limits.max_positions is None:
        return max_new_tokens
    return max(0, min(max_new_tokens, limits.max_positions - prompt_length))


def _waves(limits: Sequence[int], size: int) -> Iterator[tuple[list[int], int]]:
    """Yields (numbers of at most `size` prompts, the limit that they share).

    A row whose answer has ended goes on as padding while other rows of its wave are not finished, and its positions
    must not run out: therefore all prompts of a wave have the same limit.
    """
    by_limit = defaultdict(list)
    for number, limit in enumerate(limits):
        by_limit[limit].append(number)
    for limit, numbers in by_limit.items():
        for first in range(0, len(numbers), size) if limit else ():
            yield numbers[first : first + size], limit


@contextmanager
def _generating(policy: Policy, keeps_layers: bool) -> Iterator[None]:
    """Sets the model up for `generate`, and for training again at the end, also after a failure.

    Attention is transformers' "sdpa", since our own has no KV cache. With `keeps_layers` layers stay unsharded from
    token to token, instead of one all-gather per token. cuDNN attention is disabled: it plans each length anew, which
    takes about 0.4 s (https://github.com/sgl-project/sglang/issues/4650). Compiled layers run uncompiled: each new
    length of the cache would compile another graph and count against the compiler's limit.
    """
    model = policy.model
    attention, defaults, is_training = model.config._attn_implementation, model.generation_config, model.training
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa", "transformers refused sdpa with only a warning"
    model.generation_config = GenerationConfig()  # else the model's own would fill in the options that ours leaves open
    model.eval()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    _reshard_layers(policy, policy.parallel.reshard_after_forward and not keeps_layers)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _reshard_layers(policy, policy.parallel.reshard_after_forward)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        model.train(is_training)
        model.generation_config = defaults
        model.set_attn_implementation(attention)
        reshard(policy)


def _reshard_layers(policy: Policy, after_forward: bool) -> None:
    """Sets whether layers are resharded after their forward pass."""
    for layer in decoder_layers(policy.model):
        assert isinstance(layer, FSDPModule)
        layer.set_reshard_after_forward(after_forward, recurse=False)


def keeps_layers_whole(layer_bytes: int, cache_bytes: int | None, free_bytes: int) -> bool:
    """Returns whether a rank can hold all unsharded layers and its KV cache in 4/5 of its free memory; False where the
    size of the cache is not known.

    Args:
        layer_bytes: bytes of all unsharded layers in their compute dtype.
        cache_bytes: bytes of the KV cache of the rows that the rank answers at a time; None where not known.
        free_bytes: bytes that the rank can still allocate.
    """
    return cache_bytes is not None and layer_bytes + cache_bytes <= 0.8 * free_bytes


def _layer_bytes(policy: Policy) -> int:
    """Returns the bytes of all unsharded layers in their compute dtype."""
    itemsize = compute_dtype(policy.parallel, policy.dtype, policy.device).itemsize
    return itemsize * sum(p.numel() for layer in decoder_layers(policy.model) for p in layer.parameters())


def _cache_bytes(policy: Policy, num_tokens: int) -> int | None:
    """Returns the bytes of the KV caches of the rows that a rank answers at a time, twice, since a cache grows by
    copying; None where they are not known.
    """
    itemsize = compute_dtype(policy.parallel, policy.dtype, policy.device).itemsize
    elements = cached_elements(policy.config)
    return None if elements is None else 2 * ROWS_PER_LANE * num_tokens * elements * itemsize


def cached_elements(config: PretrainedConfig) -> int | None:
    """Returns the maximum number of elements of keys and values that a model caches per token.

    It takes the largest numbers of heads and head sizes that the config names, and no account of windows, which cache
    less. None where the config does not tell: latent attention, or different heads per layer.
    """
    attributes: dict[str, Any] = vars(config)
    if attributes.get("kv_lora_rank") or getattr(config, "is_heterogeneous", False):
        return None
    usual: list[Any] = [
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    ]
    depth, heads, hidden = usual
    key_heads = [value for name, value in attributes.items() if name.endswith("key_value_heads") and value] or [heads]
    widths = [value for name, value in attributes.items() if name.endswith("head_dim") and value]
    if not widths and isinstance(heads, int) and isinstance(hidden, int):
        widths = [hidden // heads]
    is_known = bool(widths) and all(isinstance(size, int) for size in (depth, *key_heads, *widths))
    return 2 * depth * max(key_heads) * max(widths) if is_known else None


def _free_bytes(world: World) -> int:
    """Returns the bytes that this rank can still allocate: on its GPU, or its share of the host's memory."""
    if world.device.type == "cuda":
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held
    return host_memory()[0] // world.local_size


def _answer_rows(
    policy: Policy, prompts: Sequence[Sequence[int]], rule: AnswerRule, limit: int, world: World
) -> list[Ids]:
    """Returns this lane's answers of one wave, of at most `limit` tokens each.

    Every rank must get here, or the rest hang: with `synced_gpus` all ranks run forward passes until the last of them
    has finished.
    """
    eos_ids = rule.eos_ids
    pad = eos_ids[0] if eos_ids else 0
    ids, mask = _left_padded(prompts, pad, policy.device)
    choose = []
    if rule.temperature > 0:
        uniforms = [[uniform(rule.seed, prompt, place) for place in range(limit)] for prompt in prompts]
        choose = [
            _Draw(torch.tensor(uniforms, device=policy.device, dtype=torch.float64), ids.shape[1], rule.temperature)
        ]
    config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, use_cache=True, eos_token_id=list(eos_ids) or None, pad_token_id=pad
    )
    generated = policy.model.generate(
        ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList(choose),
        synced_gpus=world.size > 1,
    )
    return [_until_eos(row, eos_ids) for row in generated[:, ids.shape[1] :].tolist()]


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns (ids, mask), both (prompts, longest prompt), with each prompt at the end of its row."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + [int(token) for token in prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _until_eos(ids: Ids, eos_ids: Sequence[int]) -> Ids:
    """Returns the ids before the first EOS."""
    ends = [place for place, token in enumerate(ids) if token in eos_ids]
    return ids[: ends[0]] if ends else ids


# --- drawn at random -------------------------------------------------------------------------------------------------


def uniform(seed: int, prompt: Sequence[int], place: int) -> float:
    """Returns the number in (0, 1] that draws a token of the answer to a prompt.

    Args:
        seed: the seed of generation; another seed gives other numbers.
        prompt: the token ids of the prompt.
        place: the place of the token in the answer, from 0.
    """
    ids = " ".join(str(int(token)) for token in prompt)
    digest = hashlib.blake2b(f"{seed} {place} {ids}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") + 1) / 2**64


class _Draw:
    """A logits processor that leaves one token possible: the first at which the cumulative softmax reaches the row's
    number. `generate` then draws without a random generator, which would be shared by all rows.

    An example: probabilities 0.2, 0.5, 0.3 have the cumulative sum 0.2, 0.7, 1.0, so that 0.6 draws the second token.
    """

    def __init__(self, uniforms: Tensor, prompt_width: int, temperature: float):
        self.uniforms, self.prompt_width, self.temperature = uniforms, prompt_width, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores (rows, V): 0 for the drawn token, -inf for the others."""
        place = input_ids.shape[1] - self.prompt_width
        cumulative = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        wanted = self.uniforms[:, place, None] * cumulative[:, -1:]  # the last is 1 up to rounding
        tokens = torch.searchsorted(cumulative, wanted).clamp(max=scores.shape[1] - 1)  # beyond the end with NaN
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)
