"""Answers from a sharded policy: transformers' own `generate`, called by all ranks with the same number of forwards.

Greedy, or drawn from the plain softmax at a temperature. A draw is a function of (seed, prompt, place in the answer):
no generator is involved, so it depends on ranks and on other prompts by the rounding of the logits alone.
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

from dpo.base.console import say
from dpo.data.tokenizer import Ids
from dpo.data.tokens import limits_of
from dpo.distributed.collectives import all_gather, gather_lanes
from dpo.distributed.world import World
from dpo.machine.facts import host_memory
from dpo.model.parallelize import compute_dtype, decoder_layers
from dpo.model.policy import Policy, reshard

ROWS_PER_LANE = 8
"""Prompts that a lane answers at a time: each needs a KV cache."""


@dataclass(frozen=True)
class AnswerRule:
    """How prompts are answered."""

    eos_ids: tuple[int, ...]
    """Tokens that end an answer."""
    max_new_tokens: int
    temperature: float = 0.0
    """0: the likeliest token at each place; above 0, tokens are drawn from the softmax at this temperature."""
    seed: int = 0


def generate(policy: Policy, prompts: Sequence[Sequence[int]], rule: AnswerRule, world: World) -> list[Ids]:
    """Returns the answer to each of `prompts` (token ids, at least one each): ids after the prompt, without EOS.

    An answer ends early, and rank 0 says so, where learned positions do. Every rank must get here with the same
    prompts, or the rest hang, and gets all answers. Nothing of training is changed.
    """
    max_new_tokens = rule.max_new_tokens
    limits = [_room(policy, len(prompt), max_new_tokens) for prompt in prompts]
    if world.is_main and min(limits, default=max_new_tokens) < max_new_tokens:
        num_cut = sum(limit < max_new_tokens for limit in limits)
        say(f"{num_cut} answers end before {max_new_tokens} tokens, where the model's positions do")
    answers: list[Ids] = [[] for _ in prompts]
    cache_bytes = _cache_bytes(policy, max(map(len, prompts), default=0) + max_new_tokens)
    # Every rank must keep its layers, or none: the rest would hang in gathers that others do not join.
    keeps = all(all_gather(keeps_layers_whole(_layer_bytes(policy), cache_bytes, _free_bytes(world))))
    with _generating(policy, keeps):
        for numbers, limit in _waves(limits, world.num_lanes * ROWS_PER_LANE):
            mine = numbers[world.lane :: world.num_lanes]
            asked = [prompts[i] for i in mine or numbers[:1]]  # a lane without a prompt runs the first one along
            rows = _answer_rows(policy, asked, rule, limit, world)[: len(mine)]
            for number, answer in itertools.chain(*gather_lanes(list(zip(mine, rows, strict=True)))):
                answers[number] = answer
    return answers


def _room(policy: Policy, prompt_length: int, max_new_tokens: int) -> int:
    """How many tokens may follow a prompt."""
    limits = limits_of(None, None, policy.config)
    if not limits.positions_are_hard or limits.max_positions is None:
        return max_new_tokens
    return max(0, min(max_new_tokens, limits.max_positions - prompt_length))


def _waves(limits: Sequence[int], size: int) -> Iterator[tuple[list[int], int]]:
    """(numbers of at most `size` prompts, the limit that they share): a row that is done goes on as padding while
    others of its wave are not, and its positions must not run out.
    """
    by_limit = defaultdict(list)
    for number, limit in enumerate(limits):
        by_limit[limit].append(number)
    for limit, numbers in by_limit.items():
        for first in range(0, len(numbers), size) if limit else ():
            yield numbers[first : first + size], limit


@contextmanager
def _generating(policy: Policy, keeps_layers: bool) -> Iterator[None]:
    """The model as `generate` needs it, and afterwards as training needs it, also after a failure.

    `keeps_layers`: layers are gathered once for all tokens, not once a token. cuDNN's attention is off: it builds a
    plan for every length, which takes about 0.4 s (https://github.com/sgl-project/sglang/issues/4650).

    Our own attention has no KV cache. Compiled layers run uncompiled: every new length of the cache would be compiled,
    and count against the compiler's limit.
    """
    model = policy.model
    attention, defaults, is_training = model.config._attn_implementation, model.generation_config, model.training
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa", "transformers only warns where it refuses"
    model.generation_config = GenerationConfig()  # what ours leaves open would be filled in from the model's own
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
    for layer in decoder_layers(policy.model):
        assert isinstance(layer, FSDPModule)
        layer.set_reshard_after_forward(after_forward, recurse=False)


def keeps_layers_whole(layer_bytes: int, cache_bytes: int | None, free_bytes: int) -> bool:
    """Whether a rank has room for all layers at once beside its KV cache; a fifth of what is free is left alone. Not
    where the cache's size is not known.
    """
    return cache_bytes is not None and layer_bytes + cache_bytes <= 0.8 * free_bytes


def _layer_bytes(policy: Policy) -> int:
    """Bytes of all layers, whole, in the dtype that they compute in."""
    itemsize = compute_dtype(policy.parallel, policy.dtype, policy.device).itemsize
    return itemsize * sum(p.numel() for layer in decoder_layers(policy.model) for p in layer.parameters())


def _cache_bytes(policy: Policy, num_tokens: int) -> int | None:
    """Bytes of keys and values of the rows that a rank answers at a time, twice: a cache grows by copying."""
    itemsize = compute_dtype(policy.parallel, policy.dtype, policy.device).itemsize
    numbers = cached_numbers(policy.config)
    return None if numbers is None else 2 * ROWS_PER_LANE * num_tokens * numbers * itemsize


def cached_numbers(config: PretrainedConfig) -> int | None:
    """Numbers of keys and values that a model caches for a token, at most: of heads and widths the largest that the
    config names, and a window may forget some. None where it does not tell: latent attention, or heads by layer.
    """
    told: dict[str, Any] = vars(config)
    if told.get("kv_lora_rank") or getattr(config, "is_heterogeneous", False):
        return None
    usual: list[Any] = [
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    ]
    depth, heads, hidden = usual
    key_heads = [value for name, value in told.items() if name.endswith("key_value_heads") and value] or [heads]
    widths = [value for name, value in told.items() if name.endswith("head_dim") and value]
    if not widths and isinstance(heads, int) and isinstance(hidden, int):
        widths = [hidden // heads]
    is_told = bool(widths) and all(isinstance(size, int) for size in (depth, *key_heads, *widths))
    return 2 * depth * max(key_heads) * max(widths) if is_told else None


def _free_bytes(world: World) -> int:
    """Bytes that this rank may still take: of its GPU, or its share of the host's memory."""
    if world.device.type == "cuda":
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held
    return host_memory()[0] // world.local_size


def _answer_rows(
    policy: Policy, prompts: Sequence[Sequence[int]], rule: AnswerRule, limit: int, world: World
) -> list[Ids]:
    """Answers one wave of one lane with at most `limit` tokens each. Every rank must get here, or the rest hang:
    `synced_gpus` goes on until the last of them is done.
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
    found = policy.model.generate(
        ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList(choose),
        synced_gpus=world.size > 1,
    )
    return [_until_eos(row, eos_ids) for row in found[:, ids.shape[1] :].tolist()]


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (prompts, longest prompt), each prompt at the end of its row."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + [int(token) for token in prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _until_eos(ids: Ids, eos_ids: Sequence[int]) -> Ids:
    ends = [place for place, token in enumerate(ids) if token in eos_ids]
    return ids[: ends[0]] if ends else ids


# --- drawn at random -------------------------------------------------------------------------------------------------


def uniform(seed: int, prompt: Sequence[int], place: int) -> float:
    """The number in (0, 1] that decides token `place` (from 0) of the answer to a prompt."""
    ids = " ".join(str(int(token)) for token in prompt)
    digest = hashlib.blake2b(f"{seed} {place} {ids}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") + 1) / 2**64


class _Draw:
    """A logits processor that leaves one token possible: the first at which the cumulated softmax reaches the row's
    number. So `generate` draws without a random generator, which would be one for all rows.
    """

    def __init__(self, uniforms: Tensor, prompt_width: int, temperature: float):
        self.uniforms, self.prompt_width, self.temperature = uniforms, prompt_width, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, vocabulary) scores: 0 for the drawn token, -inf for the others."""
        place = input_ids.shape[1] - self.prompt_width
        cumulated = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        wanted = self.uniforms[:, place, None] * cumulated[:, -1:]  # whose last is 1 up to rounding
        tokens = torch.searchsorted(cumulated, wanted).clamp(max=scores.shape[1] - 1)  # over the end where one is NaN
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)
