"""Texts -> token ids: tokenizers, chat templates, the seam between prompt and completion."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers

from dpo.base.errors import UserError
from dpo.base.hub import is_tokenizer_id
from dpo.data.formats.example import Example
from dpo.data.formats.row_fields import Message

Ids = list[int]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its ends; without one (`format: tokens`) the ends are those of the model's config."""

    tokenizer: Any  # transformers.PreTrainedTokenizerBase, or None
    bos_id: int | None
    eos_ids: tuple[int, ...]  # the first is the one that is appended
    adds_eos: bool = False


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id. Raises UserError if it cannot be loaded or has no EOS token."""
    if not Path(path).is_dir() and not is_tokenizer_id(path):
        raise UserError("model.tokenizer", f"{path}: no such folder", "a folder with a tokenizer, a hub id org/name")
    try:
        if Path(path).is_dir() and not has_tokenizer(Path(path)):
            raise OSError("it holds none")  # transformers makes an empty one from a model's config
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :")
        raise UserError("model.tokenizer", f"{path}: cannot be loaded: {what}", "a tokenizer's folder") from error
    if tokenizer.eos_token_id is None:
        raise UserError("model.tokenizer", f"{path}: the tokenizer has no EOS token", "one with an eos_token")
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
        raise UserError("model.tokenizer", f"{tokenizer.name_or_path}: {what}", "the tokenizer of the model")


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


def encode(example: Example, encoder: Encoder) -> tuple[Ids, list[Ids]]:
    """The ids of the prompt and of each completion, EOS appended, before any limit."""
    if encoder.tokenizer is None:
        return list(example.prompt), [list(ids) for ids in example.completions]  # type: ignore[arg-type]  # ids
    if isinstance(example.prompt, str):
        prompt = _encode(encoder.tokenizer, example.prompt, True)
        completions = [_encode(encoder.tokenizer, text, False) for text in example.completions]
        return prompt[:-1] if encoder.adds_eos else prompt, [_with_eos(ids, encoder) for ids in completions]
    prompt_text, answers = chat_texts(encoder.tokenizer, example.prompt, example.completions)  # type: ignore[arg-type]  # chat
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
        return str(tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=add_generation_prompt))
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
        prompt, texts = chat_texts(encoder.tokenizer, prompt, texts)  # type: ignore[arg-type, assignment]  # chat
    apart = [_encode(encoder.tokenizer, text, False) for text in (prompt, *texts)]
    joined = [_encode(encoder.tokenizer, str(prompt) + str(text), False) for text in texts]
    return sum(apart[0] + ids != both for ids, both in zip(apart[1:], joined, strict=True))
