"""An `Example` becomes token ids: what the model reads when it generates, and the completion as it should end.

Prompt and completion are tokenized apart and never joined. Text: the prompt as the tokenizer encodes it, without an EOS
that it adds; a completion without special tokens, and EOS. Chat: both parts of what the tokenizer's own chat template
writes. Tokens: the ids as they are. Then each prompt keeps its last `max_prompt_length` tokens (and its BOS) and each
completion its first `max_length - len(prompt)`. Pairs that carry no preference are dropped here, with the reason.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo.data.formats.example import Example, Index
from dpo.data.formats.row_fields import Message
from dpo.data.tokenizer import Encoder, Ids, encode


@dataclass(frozen=True)
class Limits:
    """The numbers that decide over ids: lengths in tokens (null: no limit), and what the model can take.

    `max_positions` is how far the model's positions reach; where `positions_are_hard` nothing may be longer.
    """

    max_length: int | None
    max_prompt_length: int | None
    vocab_size: int
    max_positions: int | None
    positions_are_hard: bool


@dataclass(frozen=True)
class TokenizedExample:
    """One prompt, its K completions as ids, the kept pairs (winner, loser), and what was done to them.

    `full_prompt_ids` is the prompt before truncation. `dropped` has one reason a dropped pair. The counts are over
    completions that stand in a kept pair: cut ones, and those longer than the model's positions; `prompt_truncated`
    and all counts are 0 where no pair is kept.
    """

    prompt_ids: Ids
    full_prompt_ids: Ids
    completion_ids: tuple[Ids, ...]
    pairs: tuple[Index, ...]
    dropped: tuple[str, ...]
    prompt_truncated: bool = False
    completions_truncated: int = 0
    over_positions: int = 0


def limits_of(max_length: int | None, max_prompt_length: int | None, model_config: Any) -> Limits:
    """The limits of a run; how many positions a model has is hard where a longer row would be wrong, not only unusual.

    So it is for learned positions: a config with positions but no `rope_parameters` (GPT-2, OPT, …). And for RoPE whose
    frequencies depend on the longest position in the row (`dynamic`, `longrope`): beyond their first range a
    completion's log-probability would depend on what else is in its micro-batch.
    """
    positions = getattr(model_config, "max_position_embeddings", None)
    rope = getattr(model_config, "rope_parameters", None) or {}
    is_elastic = rope.get("rope_type") in ("dynamic", "longrope")
    if is_elastic:
        positions = rope.get("original_max_position_embeddings") or positions
    is_hard = positions is not None and (is_elastic or not rope)
    return Limits(max_length, max_prompt_length, model_config.vocab_size, positions, is_hard)


# --- tokenizers -----------------------------------------------------------------------------------------------------


# --- one example ----------------------------------------------------------------------------------------------------


def tokenize(example: Example, encoder: Encoder, limits: Limits) -> TokenizedExample:
    """Raises ValueError("what"): an id outside of the vocabulary, a prompt without a token, a chat template that does
    not serve, and a completion that is longer than learned positions reach."""
    if not example.pairs:
        return TokenizedExample([], [], tuple([] for _ in example.completions), (), example.dropped)
    full_prompt, full_completions = encode(example, encoder)
    for ids in (full_prompt, *full_completions):
        _check_ids(ids, limits.vocab_size)
    if not full_prompt:
        raise ValueError("the prompt has no token; valid: at least one, from which the completion's first is predicted")
    prompt = cut_prompt(full_prompt, limits.max_prompt_length, encoder.bos_id)
    room = None if limits.max_length is None else max(0, limits.max_length - len(prompt))
    completions = tuple(ids[:room] for ids in full_completions)
    is_empty = [_is_empty(*both, encoder.eos_ids) for both in zip(example.completions, full_completions, strict=True)]
    reasons = [_reason(pair, is_empty, full_completions, completions) for pair in example.pairs]
    kept = tuple(pair for pair, reason in zip(example.pairs, reasons, strict=True) if reason is None)
    used = {i for pair in kept for i in pair}
    return TokenizedExample(
        prompt_ids=prompt,
        full_prompt_ids=full_prompt,
        completion_ids=completions,
        pairs=kept,
        dropped=example.dropped + tuple(reason for reason in reasons if reason is not None),
        prompt_truncated=bool(kept) and len(prompt) < len(full_prompt),
        completions_truncated=sum(len(completions[i]) < len(full_completions[i]) for i in used),
        over_positions=_count_over_positions(len(prompt), [len(completions[i]) for i in used], limits),
    )


def cut_prompt(ids: Ids, max_prompt_length: int | None, bos_id: int | None) -> Ids:
    """The last `max_prompt_length` ids; a BOS at the beginning stays there and counts."""
    if max_prompt_length is None or len(ids) <= max_prompt_length:
        return ids
    if ids[0] == bos_id:
        return [bos_id, *ids[len(ids) - max_prompt_length + 1 :]]
    return ids[len(ids) - max_prompt_length :]


def _reason(pair: Index, is_empty: list[bool], full: Sequence[Ids], cut: Sequence[Ids]) -> str | None:
    """Why a pair carries no preference, or None. The first that applies: empty, identical, no_room, then what
    truncation made equal."""
    winner, loser = pair
    if is_empty[winner] or is_empty[loser]:
        return "empty"
    if full[winner] == full[loser]:
        return "identical"
    if not cut[winner] or not cut[loser]:
        return "no_room"
    return "identical_after_truncation" if cut[winner] == cut[loser] else None


def _is_empty(completion: str | Message | tuple[int, ...], ids: Ids, eos_ids: tuple[int, ...]) -> bool:
    """Nothing is left of its text after strip, or there is only EOS."""
    text = completion["content"] if isinstance(completion, Mapping) else completion
    return (isinstance(text, str) and not text.strip()) or all(token in eos_ids for token in ids)


def _check_ids(ids: Ids, vocab_size: int) -> None:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"token id {wrong} is outside of the model's vocabulary; valid: 0 to {vocab_size - 1}")


def _count_over_positions(prompt_length: int, lengths: list[int], limits: Limits) -> int:
    if limits.max_positions is None:
        return 0
    over = [length for length in lengths if prompt_length + length > limits.max_positions]
    if over and limits.positions_are_hard:
        raise ValueError(
            f"prompt and completion have {prompt_length + max(over)} tokens, the model's positions end at "
            f"{limits.max_positions}; valid: data.max_length up to {limits.max_positions}"
        )
    return len(over)


# --- encoding -------------------------------------------------------------------------------------------------------


def prompt_key(prompt_ids: np.ndarray) -> bytes:
    """16 bytes that stand for a prompt's ids."""
    return hashlib.blake2b(np.asarray(prompt_ids, "<i4").tobytes(), digest_size=16).digest()


def completion_key(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bytes:
    """16 bytes that stand for a completion after a prompt: blake2b over both lengths and the ids, little-endian."""
    lengths = np.asarray([len(prompt_ids), len(completion_ids)], "<i8")
    ids = (np.asarray(ids, "<i4").tobytes() for ids in (prompt_ids, completion_ids))
    return hashlib.blake2b(b"".join([lengths.tobytes(), *ids]), digest_size=16).digest()
