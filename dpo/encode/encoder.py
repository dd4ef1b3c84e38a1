"""What turns an `Example` into ids: a tokenizer with its BOS, its stop tokens and its control tokens."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import transformers

from dpo.encode.coder import Coder, Ids, encode_text, marked_coder, plain_coder
from dpo.encode.controls import Controls, make_controls
from dpo.encode.stops import model_stop_ids, stop_ids


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with its BOS and stop tokens. For `format: tokens` there is no tokenizer, and these are the
    model's.
    """

    tokenizer: Any
    """A transformers.PreTrainedTokenizerBase, or None."""
    bos_id: int | None
    stop_ids: tuple[int, ...]
    """Tokens that end a completion; the first of them, EOS, is appended to completions without an end."""
    adds_bos: bool = False
    """Whether the tokenizer puts BOS before every text."""
    adds_eos: bool = False
    """Whether the tokenizer appends EOS to every text, so that it must be removed from prompts."""

    @functools.cached_property
    def controls(self) -> Controls:
        """Returns the control tokens of the tokenizer by their texts."""
        return make_controls(self.tokenizer, self.stop_ids)

    @functools.cached_property
    def plain(self) -> Coder:
        """Returns the tokenizer as it is: text that spells a control token is that token."""
        return plain_coder(self.tokenizer, self.controls)

    @functools.cached_property
    def marked(self) -> Coder | None:
        """Returns the coder of marked texts, where the tokenizer can be copied."""
        return marked_coder(self.tokenizer, self.controls)


@dataclass(frozen=True)
class Completion:
    """A completion as ids, before any limit."""

    ids: Ids
    is_merged: bool = False
    """Whether the tokenizer merges characters of prompt and completion in one token where it is given both as one
    text.
    """
    is_unclear: bool = False
    """Whether its text spells a control token that can be read neither as text nor as the token with certainty."""


@dataclass(frozen=True)
class Encoded:
    """An example as ids, before any limit, and how its texts were read."""

    prompt_ids: Ids
    completions: tuple[Completion, ...]
    kind: str = ""
    """`chats`: messages, by the chat template. `texts`: texts whose prompt holds no control token but BOS.
    `rendered_chats`: texts whose prompt does. Empty for rows of ids.
    """
    has_control_text: bool = False
    """Whether a message or an answer spells a control token that stays text."""
    has_written_bos: bool = False
    """Whether the text of the prompt begins with BOS, so that the tokenizer's was left out."""
    has_trimmed_end: bool = False
    """Whether the text of an answer goes on after the stop token that ends it: by white space or more stop tokens."""
    has_unwritten: bool = False
    """Whether the chat template leaves out a content or a tool call of the messages (`unwritten.leaves_out`)."""


def text_encoder(tokenizer: Any, of_model: Sequence[int] = ()) -> Encoder:
    """Returns the encoder of texts and chats; finds out by a trial whether the tokenizer adds BOS and EOS.

    Args:
        tokenizer: a transformers tokenizer with an EOS token.
        of_model: the model's stop tokens.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    without, with_special = encode_text(tokenizer, "a"), encode_text(tokenizer, "a", True)
    adds_bos, adds_eos = with_special[0] == bos != without[0], with_special[-1] == eos != without[-1]
    return Encoder(tokenizer, bos, stop_ids(tokenizer, tuple(of_model)), adds_bos, adds_eos)


def ids_encoder(model_config: Any, of_model: Sequence[int] | None = None) -> Encoder:
    """Returns the encoder of `format: tokens`: no tokenizer; BOS and stop tokens are the model's.

    Args:
        model_config: the transformers config of the model.
        of_model: the model's stop tokens; None: those of its config.
    """
    found = model_stop_ids(model_config, None) if of_model is None else tuple(of_model)
    return Encoder(None, getattr(model_config, "bos_token_id", None), found)


def encoder_content(encoder: Encoder) -> str:
    """Returns a text that is equal only for encoders that give equal ids. It is made from the tokenizer's content, not
    from its path.
    """
    parts: list[Any] = [encoder.bos_id, encoder.stop_ids, encoder.adds_bos, encoder.adds_eos]
    if encoder.tokenizer is not None:
        tokenizer = encoder.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        table = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        versions = [transformers.__version__, tokenizers.__version__, type(tokenizer).__name__]
        probe = encode_text(tokenizer, "a b", True)  # shows special tokens that are added outside of the backend
        parts += [*versions, table, tokenizer.chat_template, tokenizer.special_tokens_map, probe]
    return json.dumps(parts, default=str)


def template_name(encoder: Encoder) -> str:
    """Returns a name of the tokenizer's chat template by its content: 8 hex digits and its first characters; empty
    where there is none.
    """
    template = getattr(encoder.tokenizer, "chat_template", None)
    if not template:
        return ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:8]} {text[:40]!r}…"


def writes_date(encoder: Encoder) -> bool:
    """Returns whether the tokenizer's chat template may write the date of the day, as Llama 3.1's does."""
    return "strftime_now" in json.dumps(getattr(encoder.tokenizer, "chat_template", None))


def surplus_tokens(encoder: Encoder, vocab_size: int) -> int:
    """Returns how many tokens the tokenizer has beyond the model's embeddings; rows that have one of them are refused.

    Gemma 3's text models have one: the image's.
    """
    return 0 if encoder.tokenizer is None else max(0, len(encoder.tokenizer) - vocab_size)
