"""Texts -> ids by a tokenizer: at the beginning of a text, and in the middle of one.

A SentencePiece tokenizer puts a space before every text that it encodes (`Prepend` and `Metaspace` of the tokenizers
library). In the middle of a text that space would be one that nobody wrote, so texts that follow others are encoded by
a copy of the tokenizer without it.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from dpo.base.errors import InvalidValue
from dpo.encode.controls import Controls, marks

Ids = list[int]
"""Token ids."""
TAIL = 256
"""Characters at the end of a prompt in which a place to cut it is looked for (`completions_after`)."""


@dataclass(frozen=True)
class Coder:
    """A tokenizer as two functions from a text to ids; neither adds special tokens around the text."""

    at_start: Callable[[str], Ids]
    """Encodes a text that nothing precedes."""
    inside: Callable[[str], Ids]
    """Encodes a text that another one precedes, up to its first control token."""
    controls: re.Pattern[str]
    """Matches the texts that are control tokens for this coder."""

    def after(self, text: str) -> Ids:
        """Encodes a text that another one precedes. What follows a control token is encoded as it is at a start."""
        found = self.controls.search(text)
        head, rest = (text, "") if found is None else (text[: found.start()], text[found.start() :])
        return (self.inside(head) if head else []) + (self.at_start(rest) if rest else [])


def plain_coder(tokenizer: Any, controls: Controls) -> Coder:
    """Returns the tokenizer itself as a coder: text that spells a control token is that token."""
    at_start = functools.partial(encode_text, tokenizer)
    bare = _without_prefix(tokenizer)
    inside = at_start if bare is None else functools.partial(_backend_ids, bare, {})
    return Coder(at_start, inside, controls.pattern)


def marked_coder(tokenizer: Any, controls: Controls) -> Coder | None:
    """Returns a coder of marked texts: a mark is its control token, and text that spells one is text. None where the
    tokenizer is not of the tokenizers library, so that it cannot be copied and changed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    bare = _without_prefix(tokenizer) or backend
    at_start, inside = (_marked_function(each, controls) for each in (backend, bare))
    return Coder(at_start, inside, re.compile(f"[{''.join(marks(controls))}]"))


def _marked_function(backend: Tokenizer, controls: Controls) -> Callable[[str], Ids]:
    """Returns a function from a marked text to its ids."""
    marked, signs = _with_marks(backend, controls), marks(controls)
    added = marked.get_added_tokens_decoder().items()
    codes = {number: signs[token.content] for number, token in added if token.content in signs}
    return functools.partial(_backend_ids, marked, codes)


def encode_text(tokenizer: Any, text: str, add_special_tokens: bool = False) -> Ids:
    """Returns the ids of a text, without transformers' warning about its length. Raises InvalidValue where the
    tokenizer fails.
    """
    try:
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    except ValueError as error:
        raise InvalidValue(f"the tokenizer refuses {text[:40]!r}: {error}") from error


def _backend_ids(backend: Tokenizer, codes: Mapping[int, int], text: str) -> Ids:
    """Returns the ids of a text; ids that are keys of `codes` are replaced by their values."""
    return [codes.get(number, number) for number in backend.encode(text, add_special_tokens=False).ids]


# --- changed copies of a tokenizer -----------------------------------------------------------------------------------


def _without_prefix(tokenizer: Any) -> Tokenizer | None:
    """Returns a copy that puts nothing before a text; None where the tokenizer puts nothing there either."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    settings = json.loads(backend.to_str())
    bare = settings | {name: _bare(settings[name]) for name in ("normalizer", "pre_tokenizer")}
    return None if bare == settings else _copied(bare)


def _bare(part: Any) -> Any:
    """Returns the settings of a normalizer or pre-tokenizer, without what it puts before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    changes: dict[str, Any] = {
        name: [inner for inner in map(_bare, part[name]) if inner is not None]
        for name in ("normalizers", "pretokenizers")
        if name in part
    }
    if "prepend_scheme" in part:
        changes["prepend_scheme"] = "never"
    if "add_prefix_space" in part:
        changes["add_prefix_space"] = False
    return part | changes


def _with_marks(backend: Tokenizer, controls: Controls) -> Tokenizer:
    """Returns a copy in which the marks are added tokens, and no control token is found in a text."""
    settings = json.loads(backend.to_str())
    for added in settings["added_tokens"]:
        added["special"] = added["special"] or added["content"] in controls.ids
    sides = {added["content"]: (added["lstrip"], added["rstrip"]) for added in settings["added_tokens"]}
    tokens = []
    for sign, spelt in zip(marks(controls), controls.ids, strict=True):
        left, right = sides.get(spelt, (False, False))
        tokens.append(AddedToken(sign, lstrip=left, rstrip=right, normalized=False, special=False))
    marked = _copied(settings)
    marked.add_tokens(tokens)
    marked.encode_special_tokens = True
    return marked


def _copied(settings: Mapping[str, Any]) -> Tokenizer:
    copied = Tokenizer.from_str(json.dumps(settings))
    copied.no_truncation()
    copied.no_padding()
    return copied


# --- what follows a prompt -------------------------------------------------------------------------------------------


def completions_after(coder: Coder, prompt: str, prompt_ids: Ids, texts: Sequence[str]) -> list[tuple[Ids, bool]]:
    """Returns the ids of each text after a prompt, and whether the tokenizer merges both at their boundary.

    The ids of a completion are the rest of the ids of prompt and completion as one text, where these begin with the
    prompt's. Else the tokenizer merges characters of both into one token: the completion is then encoded apart, without
    a space or prefix that the tokenizer puts before a text.

    A short tail of the prompt stands for the whole: it begins where tokenizers cut a text anyway (`_last_cut`), and is
    taken only if its ids are the last ids of the prompt.

    Args:
        coder: the tokenizer.
        prompt: the text of the prompt.
        prompt_ids: its ids; special tokens may stand before them.
        texts: the texts of the completions.
    """
    begin = _tail_start(prompt, coder.controls)
    encode, tail = (coder.after, prompt[begin:]) if begin else (coder.at_start, prompt)
    tail_ids = encode(tail)
    if begin and prompt_ids[len(prompt_ids) - len(tail_ids) :] != tail_ids:
        encode, tail = coder.at_start, prompt
        tail_ids = encode(tail)
    return [_completion_after(coder, encode(tail + text), tail_ids, text) for text in texts]


def _completion_after(coder: Coder, both: Ids, tail_ids: Ids, text: str) -> tuple[Ids, bool]:
    is_merged = both[: len(tail_ids)] != tail_ids
    return (coder.after(text) if is_merged else both[len(tail_ids) :]), is_merged


def _tail_start(text: str, controls: re.Pattern[str]) -> int:
    """Returns the last place in the last TAIL characters of a text that `_last_cut` finds; 0 where there is none."""
    last = _last_cut(controls).match(text, max(0, len(text) - TAIL))
    return 0 if last is None else last.end()


@functools.lru_cache(maxsize=8)
def _last_cut(controls: re.Pattern[str]) -> re.Pattern[str]:
    """Returns a pattern that matches up to the last place before a single space, after a line feed, before a mark of
    Chinese or Japanese (which have no spaces), or before a control token.
    """
    places = (r"(?<=\S)(?= \S)", r"(?<=\n)(?=\S)", r"(?<=\w)(?=[、。，！？：；])", f"(?={controls.pattern})")
    return re.compile(f".*(?:{'|'.join(places)})", re.DOTALL)
