"""An `Example` -> token ids: the prompt as the model reads it when it generates, and completions that end with a stop
token (`dpo.encode.encoding`).

Each prompt keeps its last `max_prompt_length` tokens (and its BOS), and each completion keeps its first
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
from dpo.encode.coder import Ids
from dpo.encode.encoder import Completion, Encoded, Encoder
from dpo.encode.encoding import encode
from dpo.sources.formats.example import Example, Index
from dpo.sources.formats.row_fields import Message

FAULTS = ("control_token", "empty")
"""Reasons that a single completion gives, the first one first."""
BESIDE_CONTENT = ("tool_calls", "reasoning_content", "thinking", "reasoning")
"""The keys of a message that a template writes beside its content."""


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

    The counts are 0, the facts false and `kind` empty where no pair is kept.
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
    boundary_merges: int = 0
    """Completions in a kept pair that the tokenizer merges with their prompt where it is given both as one text."""
    kind: str = ""
    """`Encoded.kind`."""
    has_two_bos: bool = False
    """Whether the prompt begins with two BOS."""
    has_control_text: bool = False
    """`Encoded.has_control_text`; so for the next three."""
    has_written_bos: bool = False
    has_trimmed_end: bool = False
    has_unwritten: bool = False


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
    encoded = encode(example, encoder)
    full_prompt, full_completions = encoded.prompt_ids, [completion.ids for completion in encoded.completions]
    for ids in (full_prompt, *full_completions):
        check_ids(ids, limits.vocab_size)
    if not full_prompt:
        raise InvalidValue("the prompt has no token", "at least one, from which the completion's first is predicted")
    prompt = cut_prompt(full_prompt, limits.max_prompt_length, encoder.bos_id)
    room = None if limits.max_length is None else max(0, limits.max_length - len(prompt))
    completions = tuple(ids[:room] for ids in full_completions)
    faults = [_fault(*each, encoder.stop_ids) for each in zip(example.completions, encoded.completions, strict=True)]
    reasons = [_reason(pair, faults, full_completions, completions) for pair in example.pairs]
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
        boundary_merges=sum(encoded.completions[i].is_merged for i in used),
        **(_facts(encoded, encoder.bos_id) if kept else {}),
    )


def _facts(encoded: Encoded, bos_id: int | None) -> dict[str, Any]:
    """Returns the facts of a row with a kept pair, as fields of `TokenizedExample`."""
    return {
        "kind": encoded.kind,
        "has_two_bos": encoded.prompt_ids[:2] == [bos_id, bos_id],
        "has_control_text": encoded.has_control_text,
        "has_written_bos": encoded.has_written_bos,
        "has_trimmed_end": encoded.has_trimmed_end,
        "has_unwritten": encoded.has_unwritten,
    }


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


def _reason(pair: Index, faults: list[str | None], full: Sequence[Ids], cut: Sequence[Ids]) -> str | None:
    """Returns why a pair carries no preference, or None: the first that applies of control_token, empty, identical,
    no_room and identical_after_truncation.
    """
    winner, loser = pair
    found = {faults[winner], faults[loser]} - {None}
    if found:
        return min(found, key=FAULTS.index)
    is_compared = winner != loser  # no demonstration
    if is_compared and full[winner] == full[loser]:
        return "identical"
    if not cut[winner] or not cut[loser]:
        return "no_room"
    return "identical_after_truncation" if is_compared and cut[winner] == cut[loser] else None


def _fault(text: str | Message | tuple[int, ...], completion: Completion, stop_ids: tuple[int, ...]) -> str | None:
    """Returns why a completion may be in no pair: `control_token` where its text spells one that cannot be read with
    certainty, `empty` where its text is empty after strip or its ids are stop tokens only; else None.
    """
    if completion.is_unclear:
        return "control_token"
    return "empty" if _is_blank(text) or all(token in stop_ids for token in completion.ids) else None


def _is_blank(completion: str | Message | tuple[int, ...]) -> bool:
    """Returns whether a text, or a message without tool calls and thoughts, is empty after strip."""
    if isinstance(completion, Mapping):
        return not any(completion.get(key) for key in BESIDE_CONTENT) and _is_blank(completion.get("content") or "")
    return isinstance(completion, str) and not completion.strip()


def check_ids(ids: Ids, vocab_size: int) -> None:
    """Raises InvalidValue for an id outside of the vocabulary: of a row, or of a tokenizer of another model."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        valid = f"0 to {vocab_size - 1}, as from the model's own tokenizer"
        raise InvalidValue(f"token id {wrong} is outside of the model's vocabulary", valid)


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
