"""An `Example` becomes token ids: what the model reads when it generates, and the completion as it should end.

Prompt and completion are tokenized apart and never joined. Text: the prompt as the tokenizer encodes it, without an EOS
that it adds; a completion without special tokens, and EOS. Chat: both parts of what the tokenizer's own chat template
writes. Tokens: the ids as they are. Then each prompt keeps its last `max_prompt_length` tokens (and its BOS) and each
completion its first `max_length - len(prompt)`. Pairs that carry no preference are dropped here, with the reason.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers

from dpo.base.errors import UserError
from dpo.config.rules import is_tokenizer_id
from dpo.data.formats.examples import Example, Index, Message

Ids = list[int]


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
class Encoder:
    """A tokenizer and its ends; without one (`format: tokens`) the ends are those of the model's config."""

    tokenizer: Any  # transformers.PreTrainedTokenizerBase, or None
    bos_id: int | None
    eos_ids: tuple[int, ...]  # the first is the one that is appended
    adds_eos: bool = False


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


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id. Raises UserError if it cannot be loaded or has no EOS token."""
    if not Path(path).is_dir() and not is_tokenizer_id(path):
        raise UserError(f"model.tokenizer: {path}: no such folder; valid: a folder with a tokenizer, a hub id org/name")
    try:
        if Path(path).is_dir() and not has_tokenizer(Path(path)):
            raise OSError("it holds none")  # transformers makes an empty one from a model's config
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :")
        raise UserError(f"model.tokenizer: {path}: cannot be loaded: {what}; valid: a tokenizer's folder") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.tokenizer: {path}: the tokenizer has no EOS token; valid: one with an eos_token")
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or any(folder.glob("*vocab*"))


def text_encoder(tokenizer: Any) -> Encoder:
    eos = tokenizer.eos_token_id
    adds_eos = _encode(tokenizer, "a", True)[-1] == eos != _encode(tokenizer, "a", False)[-1]
    return Encoder(tokenizer, tokenizer.bos_token_id, (eos,), adds_eos)


def ids_encoder(model_config: Any) -> Encoder:
    """For `format: tokens`: no tokenizer; BOS and EOS are the model's (a config may name several EOS)."""
    eos = getattr(model_config, "eos_token_id", None)
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    return Encoder(None, getattr(model_config, "bos_token_id", None), eos_ids)


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise UserError if the tokenizer has more tokens than the model has embeddings."""
    if len(tokenizer) > vocab_size:
        what = f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocab_size}"
        raise UserError(f"model.tokenizer: {tokenizer.name_or_path}: {what}; valid: the tokenizer of the model")


def encoder_content(encoder: Encoder) -> str:
    """A text that is equal only for encoders that give equal ids: of what the tokenizer is, not of where it lies."""
    parts: list[Any] = [encoder.bos_id, encoder.eos_ids, encoder.adds_eos]
    if encoder.tokenizer is not None:
        tokenizer = encoder.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        table = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        versions = [transformers.__version__, tokenizers.__version__, type(tokenizer).__name__]
        probe = _encode(tokenizer, "a b", True)  # special tokens that are added outside of the backend
        parts += [*versions, table, tokenizer.chat_template, tokenizer.special_tokens_map, probe]
    return json.dumps(parts, default=str)


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


def encode(example: Example, encoder: Encoder) -> tuple[Ids, list[Ids]]:
    """The ids of the prompt and of each completion, EOS appended, before any limit."""
    if encoder.tokenizer is None:
        return list(example.prompt), [list(ids) for ids in example.completions]  # type: ignore[arg-type]
    if isinstance(example.prompt, str):
        prompt = _encode(encoder.tokenizer, example.prompt, True)
        completions = [_encode(encoder.tokenizer, text, False) for text in example.completions]
        return prompt[:-1] if encoder.adds_eos else prompt, [_with_eos(ids, encoder) for ids in completions]
    prompt_text, answers = chat_texts(encoder.tokenizer, example.prompt, example.completions)  # type: ignore[arg-type]
    completions = [_until_eos(_encode(encoder.tokenizer, text, False), encoder) for text in answers]
    return _encode(encoder.tokenizer, prompt_text, False), completions


def chat_texts(tokenizer: Any, messages: Sequence[Message], answers: Sequence[Message]) -> tuple[str, list[str]]:
    """What the chat template writes for the prompt, up to where the assistant begins, and for each answer after it."""
    prompt = _chat_text(tokenizer, messages, True)
    fulls = [_chat_text(tokenizer, [*messages, answer], False) for answer in answers]
    for full in fulls:
        if not full.startswith(prompt):
            raise ValueError(
                f"the tokenizer's chat template writes {full[:40]!r}… for prompt and answer, which does not begin with "
                f"the {len(prompt)} characters that it writes for the prompt alone; valid: a template that only adds"
            )
    return prompt, [full[len(prompt) :] for full in fulls]


def _chat_text(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "messages need a chat template, which the tokenizer lacks; valid: a tokenizer with one, or texts"
        )
    try:
        listed = [dict(message) for message in messages]
        return tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error


def _encode(tokenizer: Any, text: Any, add_special_tokens: bool) -> Ids:
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _with_eos(ids: Ids, encoder: Encoder) -> Ids:
    eos = encoder.eos_ids[0]
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _until_eos(ids: Ids, encoder: Encoder) -> Ids:
    """Up to the first EOS; what a template writes after it is not part of the answer."""
    eos = encoder.eos_ids[0]
    return ids[: ids.index(eos) + 1] if eos in ids else [*ids, eos]


def merges_at_boundary(example: Example, encoder: Encoder) -> int | None:
    """How many completions get other ids where prompt and completion are tokenized as one text; None for ids.

    An audit of the boundary: nothing is trained on the joined ids, other trainers do.
    """
    if encoder.tokenizer is None or not example.pairs:
        return None
    prompt, texts = example.prompt, example.completions
    if not isinstance(prompt, str):
        prompt, texts = chat_texts(encoder.tokenizer, prompt, texts)  # type: ignore[arg-type, assignment]
    apart = [_encode(encoder.tokenizer, text, False) for text in (prompt, *texts)]
    joined = [_encode(encoder.tokenizer, str(prompt) + str(text), False) for text in texts]
    return sum(apart[0] + ids != both for ids, both in zip(apart[1:], joined, strict=True))
