"""Texts -> ids: a prompt and its completions as the file has them.

The prompt is what the tokenizer makes of its text, special tokens included; an EOS that it appends is removed, and a
BOS that the text brings along is not doubled. What the text spells as a control token is that token: many files hold
chats that a template has already written. The completions follow as `coder.completions_after` says, without special
tokens, and end with a stop token: with the one that ends their text, else with EOS.

    prompt                   completion           ids of the completion
    "Q: hi A:"               " yes"               [yes, EOS]
    "Q: hi A:"               " yes</s>"           [yes, EOS]
    "Q: hi A:"               " use </s> here"     [use, <, /, s, >, here, EOS]    it stays text, counted
    "<|im_start|>user\\nhi…"  "yes<|im_end|>\\n"    [yes, <|im_end|>]               the line feed is left out, counted
    "<|im_start|>user\\nhi…"  "use <|im_end|> so"  dropped as `control_token`, counted

So control tokens in a completion are tokens where the prompt has some too (beside BOS), else text. In the last row
a stop token stands inside an answer: read as the token, it would end the answer; read as text, it would differ from
those of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dpo.encode.coder import Ids, completions_after, encode_text
from dpo.encode.controls import Controls, is_as_marked, mark, unmark
from dpo.encode.encoder import Completion, Encoded, Encoder


@dataclass(frozen=True)
class _Ending:
    """The text of a completion up to the stop token that ends it."""

    body: str
    stop: str | None
    """The stop token; None where the text has none at its end."""
    has_more: bool = False
    """Whether the text goes on after the stop token."""


def encode_texts(encoder: Encoder, prompt: str, texts: Sequence[str]) -> Encoded:
    """Returns the ids of a prompt and its completions.

    Args:
        encoder: the tokenizer with its BOS and stop tokens.
        prompt: the text of the prompt.
        texts: the texts of the completions.

    Raises:
        InvalidValue: the tokenizer refuses a text.
    """
    prompt_ids, has_written_bos = _prompt_ids(encoder, prompt)
    pattern = encoder.controls.pattern
    is_rendered = _is_rendered(encoder, prompt)
    endings = [_ending(encoder.controls, text) for text in texts]
    spelt = [pattern.search(ending.body) is not None for ending in endings]
    plain = completions_after(encoder.plain, prompt, prompt_ids, [ending.body for ending in endings])
    completions = [_completion(encoder, ending, *found) for ending, found in zip(endings, plain, strict=True)]
    for i in (i for i, is_spelt in enumerate(spelt) if is_spelt):
        if not is_rendered:
            completions[i] = _as_text(encoder, prompt, prompt_ids, endings[i])
        elif encoder.controls.stops.search(endings[i].body):
            completions[i] = Completion([], is_unclear=True)
    return Encoded(
        prompt_ids,
        tuple(completions),
        kind="rendered_chats" if is_rendered else "texts",
        has_control_text=not is_rendered and any(spelt),
        has_written_bos=has_written_bos,
        has_trimmed_end=any(ending.has_more for ending in endings),
    )


def _prompt_ids(encoder: Encoder, prompt: str) -> tuple[Ids, bool]:
    """Returns the ids of a prompt, and whether the BOS of its text stands in the place of the tokenizer's."""
    ids = encode_text(encoder.tokenizer, prompt, True)
    ids = ids[:-1] if encoder.adds_eos else ids
    has_bos = encoder.adds_bos and ids[1:2] == [encoder.bos_id]
    return (ids[1:] if has_bos else ids), has_bos


def _is_rendered(encoder: Encoder, prompt: str) -> bool:
    """Returns whether a prompt spells a control token, other than a BOS at its beginning."""
    bos = encoder.tokenizer.bos_token or ""
    return encoder.controls.pattern.search(prompt, len(bos) if prompt.startswith(bos) else 0) is not None


def _ending(controls: Controls, text: str) -> _Ending:
    found = controls.closing.search(text) if controls.pattern.search(text) else None
    if found is None:
        return _Ending(text, None)
    return _Ending(text[: found.start()], found[1], found.end() > found.end(1))


def _completion(encoder: Encoder, ending: _Ending, ids: Ids, is_merged: bool) -> Completion:
    stop = encoder.stop_ids[0] if ending.stop is None else encoder.controls.ids[ending.stop]
    return Completion([*ids, stop], is_merged)


def _as_text(encoder: Encoder, prompt: str, prompt_ids: Ids, ending: _Ending) -> Completion:
    """Returns a completion whose control tokens are text. It is unclear where the tokenizer cannot be copied, where a
    text has characters that are marks, or where the tokenizer makes a control token of plain text.
    """
    controls, text = encoder.controls, prompt + ending.body
    if encoder.marked is None or unmark(controls, text) != text:
        return Completion([], is_unclear=True)
    ((ids, is_merged),) = completions_after(encoder.marked, mark(controls, prompt), prompt_ids, [ending.body])
    if not is_as_marked(controls, ending.body, ids):
        return Completion([], is_unclear=True)
    return _completion(encoder, ending, ids, is_merged)
