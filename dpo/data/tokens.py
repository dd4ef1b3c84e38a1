"""An `Example` -> token ids: the prompt as the model reads it when it generates, and completions that end with EOS.

Prompt and completion are tokenized apart and never joined.

    text      the prompt as the tokenizer encodes it, without an EOS that it appends; the completion without special
              tokens, then EOS
    chat      the two parts of the text that the tokenizer's chat template writes
    tokens    the ids as they are

Then each prompt keeps its last `max_prompt_length` tokens (and its BOS), and each completion keeps its first
`max_length - len(prompt)` tokens. Pairs without a preference are dropped here, with the reason. An example with
`max_length` 7 and `max_prompt_length` 4, where 1 is BOS and 2 is EOS:

    prompt      1 5 6 7 8     -> 1 6 7 8    BOS counts, and stays
    chosen      11 12 13 2    -> 11 12 13   truncated: ends without EOS
    rejected    14 2          -> 14 2
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo.base.errors import InvalidValue
from dpo.data.formats.example import Example, Index
from dpo.data.formats.row_fields import Message
from dpo.data.tokenizer import Encoder, Ids, encode


@dataclass(frozen=True)
class Limits:
    """The limits on token ids: lengths in tokens (None is no limit), and the limits of the model."""

    max_length: int | None
    """The maximum length of prompt and completion together."""
    max_prompt_length: int | None
    vocab_size: int
    max_positions: int | None
    """The number of positions of the model; None where its config does not tell."""
    positions_are_hard: bool
    """Whether prompt and completion may not be longer than `max_positions`; else they are counted."""


@dataclass(frozen=True)
class TokenizedExample:
    """One prompt and its K completions as ids, the kept pairs, and counts of truncation.

    The counts are 0, and `prompt_truncated` is false, where no pair is kept.
    """

    prompt_ids: Ids
    full_prompt_ids: Ids
    """The prompt before truncation."""
    completion_ids: tuple[Ids, ...]
    pairs: tuple[Index, ...]
    """The kept pairs (winner, loser)."""
    dropped: tuple[str, ...]
    """The reason of each dropped pair."""
    prompt_truncated: bool = False
    completions_truncated: int = 0
    """Truncated completions in a kept pair."""
    over_positions: int = 0
    """Completions in a kept pair that end after the model's positions."""


def limits_of(max_length: int | None, max_prompt_length: int | None, model_config: Any) -> Limits:
    """Returns the limits of a run. The number of positions is a hard limit where a longer sequence would be wrong, not
    only unusual.

    This holds for learned positions: a config with positions but without `rope_parameters` (GPT-2, OPT, …). It also
    holds for RoPE whose frequencies depend on the longest position of the row (`dynamic`, `longrope`): beyond their
    original range the log-probability of a completion would depend on the rest of its micro-batch.

    Args:
        max_length: the maximum tokens of a prompt and a completion together; None: no limit.
        max_prompt_length: the maximum tokens of a prompt; None: no limit.
        model_config: the transformers config of the model, for its vocabulary and positions.
    """
    positions = getattr(model_config, "max_position_embeddings", None)
    rope = getattr(model_config, "rope_parameters", None) or {}
    is_elastic = rope.get("rope_type") in ("dynamic", "longrope")
    if is_elastic:
        positions = rope.get("original_max_position_embeddings") or positions
    is_hard = positions is not None and (is_elastic or not rope)
    return Limits(max_length, max_prompt_length, model_config.vocab_size, positions, is_hard)


# --- one example ----------------------------------------------------------------------------------------------------


def tokenize(example: Example, encoder: Encoder, limits: Limits) -> TokenizedExample:
    """Returns the token ids of an example, truncated to the limits, and its pairs that carry a preference.

    Args:
        example: the row, as its format reads it.
        encoder: the tokenizer with its BOS and EOS.
        limits: the limits on lengths and ids.

    Raises:
        InvalidValue: an id is outside of the vocabulary, the prompt has no token, the chat template does not serve, or
            a completion ends after the model's last position where that is a hard limit.
    """
    if not example.pairs:
        return TokenizedExample([], [], tuple([] for _ in example.completions), (), example.dropped)
    full_prompt, full_completions = encode(example, encoder)
    for ids in (full_prompt, *full_completions):
        _check_ids(ids, limits.vocab_size)
    if not full_prompt:
        raise InvalidValue("the prompt has no token", "at least one, from which the completion's first is predicted")
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
    """Returns the last `max_prompt_length` ids of a prompt; a BOS at its beginning stays there and counts.

    Args:
        ids: the token ids of the prompt, at least one.
        max_prompt_length: the maximum number of ids, at least 1; None: no limit.
        bos_id: the id of BOS; None where there is none.
    """
    if max_prompt_length is None or len(ids) <= max_prompt_length:
        return ids
    if ids[0] == bos_id:
        return [bos_id, *ids[len(ids) - max_prompt_length + 1 :]]
    return ids[len(ids) - max_prompt_length :]


def _reason(pair: Index, is_empty: list[bool], full: Sequence[Ids], cut: Sequence[Ids]) -> str | None:
    """Returns why a pair carries no preference, or None: the first that applies of empty, identical, no_room and
    identical_after_truncation.
    """
    winner, loser = pair
    if is_empty[winner] or is_empty[loser]:
        return "empty"
    if full[winner] == full[loser]:
        return "identical"
    if not cut[winner] or not cut[loser]:
        return "no_room"
    return "identical_after_truncation" if cut[winner] == cut[loser] else None


def _is_empty(completion: str | Message | tuple[int, ...], ids: Ids, eos_ids: tuple[int, ...]) -> bool:
    """Returns whether the text of a completion is empty after strip, or its ids are EOS only."""
    text = completion["content"] if isinstance(completion, Mapping) else completion
    return (isinstance(text, str) and not text.strip()) or all(token in eos_ids for token in ids)


def _check_ids(ids: Ids, vocab_size: int) -> None:
    """Raises InvalidValue for an id outside of the vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise InvalidValue(f"token id {wrong} is outside of the model's vocabulary", f"0 to {vocab_size - 1}")


def _count_over_positions(prompt_length: int, lengths: list[int], limits: Limits) -> int:
    """Returns how many completions end after the model's positions. Raises InvalidValue where that is a hard limit."""
    if limits.max_positions is None:
        return 0
    over = [length for length in lengths if prompt_length + length > limits.max_positions]
    if over and limits.positions_are_hard:
        raise InvalidValue(
            f"prompt and completion have {prompt_length + max(over)} tokens, the model's positions end at "
            f"{limits.max_positions}",
            f"data.max_length up to {limits.max_positions}",
        )
    return len(over)


# --- keys -----------------------------------------------------------------------------------------------------------


def prompt_key(prompt_ids: np.ndarray) -> bytes:
    """Returns a hash of a prompt's ids, 16 bytes."""
    return hashlib.blake2b(np.asarray(prompt_ids, "<i4").tobytes(), digest_size=16).digest()


def completion_key(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bytes:
    """Returns a hash of a completion and its prompt, 16 bytes: blake2b over both lengths and all ids, little-endian."""
    lengths = np.asarray([len(prompt_ids), len(completion_ids)], "<i8")
    ids = (np.asarray(ids, "<i4").tobytes() for ids in (prompt_ids, completion_ids))
    return hashlib.blake2b(b"".join([lengths.tobytes(), *ids]), digest_size=16).digest()
