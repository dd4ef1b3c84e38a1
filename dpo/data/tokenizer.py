"""Texts -> token ids: tokenizers, chat templates, the boundary of prompt and completion."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers

from dpo.base.errors import InvalidValue, UserError
from dpo.base.hub import is_tokenizer_id
from dpo.base.hub_files import TOKENIZER
from dpo.base.snapshots import cached_snapshot, find_code, find_snapshot, offline
from dpo.data.formats.example import Example
from dpo.data.formats.row_fields import Message

Ids = list[int]
"""Token ids."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with its BOS and EOS. For `format: tokens` there is no tokenizer, and BOS and EOS are the model's."""

    tokenizer: Any
    """A transformers.PreTrainedTokenizerBase, or None."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    """Tokens that end a completion; the first of them is appended to completions without an end."""
    adds_eos: bool = False
    """Whether the tokenizer appends EOS to every text, so that it must be removed from prompts."""


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a folder or hub id. Raises UserError if it cannot be loaded or has no EOS token."""
    try:
        folder = find_tokenizer_folder(path)
        if not has_tokenizer(folder):
            raise OSError("it holds none")  # transformers would make an empty tokenizer from the model's config
        if trust_remote_code:
            find_code(folder)
        with offline():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except InvalidValue as failure:
        raise failure.at("model.tokenizer") from failure
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :")
        raise UserError("model.tokenizer", f"{path}: cannot be loaded: {what}", "a tokenizer's folder") from error
    tokenizer.name_or_path = path  # for errors: of a hub repository its id, not the folder in the cache
    if tokenizer.eos_token_id is None:
        raise UserError("model.tokenizer", f"{path}: the tokenizer has no EOS token", "one with an eos_token")
    return tokenizer


def find_tokenizer_folder(path: str) -> Path:
    """Returns the local folder of a tokenizer: `path` itself, or a hub repository, of which the tokenizer's files are
    downloaded where the hub's cache lacks them.

    Raises UserError where there is no such folder, and as `find_snapshot` does.
    """
    if Path(path).is_dir():
        return Path(path)
    if not is_tokenizer_id(path):
        raise UserError("model.tokenizer", f"{path}: no such folder", "a folder with a tokenizer, a hub id org/name")
    return find_snapshot(path, TOKENIZER)


def tokenizer_is_here(path: str) -> bool:
    """Returns whether the tokenizer of a folder or hub id can be loaded without a request."""
    if Path(path).is_dir() or not is_tokenizer_id(path):
        return has_tokenizer(Path(path))
    snapshot = cached_snapshot(path)
    return snapshot is not None and has_tokenizer(snapshot)


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder has files of a tokenizer."""
    return any(folder.glob("tokenizer*")) or any(folder.glob("*vocab*"))


def text_encoder(tokenizer: Any) -> Encoder:
    """Returns the encoder of texts and chats; finds out by a trial whether the tokenizer appends EOS."""
    eos = tokenizer.eos_token_id
    adds_eos = _encode(tokenizer, "a", True)[-1] == eos != _encode(tokenizer, "a", False)[-1]
    return Encoder(tokenizer, tokenizer.bos_token_id, (eos,), adds_eos)


def ids_encoder(model_config: Any) -> Encoder:
    """Returns the encoder of `format: tokens`: no tokenizer, and BOS and EOS (there may be several) of the model's
    config.
    """
    eos = getattr(model_config, "eos_token_id", None)
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    return Encoder(None, getattr(model_config, "bos_token_id", None), eos_ids)


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError if the tokenizer has more tokens than the model has embeddings."""
    if len(tokenizer) > vocab_size:
        what = f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocab_size}"
        raise UserError("model.tokenizer", f"{tokenizer.name_or_path}: {what}", "the tokenizer of the model")


def encoder_content(encoder: Encoder) -> str:
    """Returns a text that is equal only for encoders that give equal ids. It is made from the tokenizer's content, not
    from its path.
    """
    parts: list[Any] = [encoder.bos_id, encoder.eos_ids, encoder.adds_eos]
    if encoder.tokenizer is not None:
        tokenizer = encoder.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        table = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        versions = [transformers.__version__, tokenizers.__version__, type(tokenizer).__name__]
        probe = _encode(tokenizer, "a b", True)  # shows special tokens that are added outside of the backend
        parts += [*versions, table, tokenizer.chat_template, tokenizer.special_tokens_map, probe]
    return json.dumps(parts, default=str)


def encode(example: Example, encoder: Encoder) -> tuple[Ids, list[Ids]]:
    """Returns the ids of the prompt and of each completion, EOS appended to texts and chats, before any limit.

    Raises InvalidValue where the tokenizer has no chat template for messages, or the template does not serve.
    """
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
    """Returns the chat template's text of the prompt, up to where the assistant begins, and of each answer after it.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: the messages of the prompt, at least one.
        answers: the assistant's messages, one per completion, each of which follows the prompt alone.

    Returns:
        The prompt's text, and the text of each answer, in the order of `answers`.

    Raises:
        InvalidValue: there is no chat template, it fails, or the text of prompt and answer does not begin with the
            text of the prompt.
    """
    prompt = _chat_text(tokenizer, messages, True)
    fulls = [_chat_text(tokenizer, [*messages, answer], False) for answer in answers]
    for full in fulls:
        if not full.startswith(prompt):
            raise InvalidValue(
                f"the tokenizer's chat template writes {full[:40]!r}… for prompt and answer, which does not begin with "
                f"the {len(prompt)} characters that it writes for the prompt alone",
                "a template that only adds",
            )
    return prompt, [full[len(prompt) :] for full in fulls]


def _chat_text(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Returns the chat template's text of messages. Raises InvalidValue where there is no template, or it fails."""
    if not tokenizer.chat_template:
        what = "messages need a chat template, which the tokenizer lacks"
        raise InvalidValue(what, "a model.tokenizer with one, or texts")
    try:
        listed = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InvalidValue(f"the tokenizer's chat template refuses the messages: {error}") from error


def _encode(tokenizer: Any, text: Any, add_special_tokens: bool) -> Ids:
    """Returns the ids of a text, without transformers' warning about its length. Raises InvalidValue where the
    tokenizer fails.
    """
    try:
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    except ValueError as error:
        raise InvalidValue(f"the tokenizer refuses {text[:40]!r}: {error}") from error


def _with_eos(ids: Ids, encoder: Encoder) -> Ids:
    """Returns the ids with EOS at their end, appended unless it is there."""
    eos = encoder.eos_ids[0]
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _until_eos(ids: Ids, encoder: Encoder) -> Ids:
    """Returns the ids up to the first EOS, which is appended where there is none. Text that a template writes after EOS
    is not part of the answer.
    """
    eos = encoder.eos_ids[0]
    return ids[: ids.index(eos) + 1] if eos in ids else [*ids, eos]


def merges_at_boundary(example: Example, encoder: Encoder) -> int | None:
    """Returns how many completions get different ids when prompt and completion are tokenized as one text; None for
    `format: tokens` and for an example without pairs.

    This is an audit only: training uses ids that were tokenized apart, where other trainers use the joined ids.
    """
    if encoder.tokenizer is None or not example.pairs:
        return None
    prompt, texts = example.prompt, example.completions
    if not isinstance(prompt, str):
        prompt, texts = chat_texts(encoder.tokenizer, prompt, texts)  # type: ignore[arg-type, assignment]  # chat
    apart = [_encode(encoder.tokenizer, text, False) for text in (prompt, *texts)]
    joined = [_encode(encoder.tokenizer, str(prompt) + str(text), False) for text in texts]
    return sum(apart[0] + ids != both for ids, both in zip(apart[1:], joined, strict=True))
