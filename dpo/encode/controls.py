"""Control tokens in texts: the control tokens that a template writes, apart from text that only spells them.

The control tokens of a tokenizer are its special tokens and the stop tokens of the model. A tokenizer reads every
occurrence of "</s>" as the token, whoever wrote it. To keep text as text, occurrences are replaced by single characters
of the private-use planes 15 and 16:

    hidden   the text of a control token inside a message, while the template renders it: plane 15
    marked   a control token, in a text that is otherwise plain: plane 16

    message      "End with <|im_end|>."            -> "End with \\U000f0001."           hide
    template     "<|im_start|>user\\nEnd with \\U000f0001.<|im_end|>\\n"
    marked       "\\U00100000user\\nEnd with <|im_end|>.\\U00100001\\n"                   mark, then reveal

A copy of the tokenizer, in which each mark is an added token and the control tokens are not, encodes the marked text
(`coder.marked_coder`). Nothing here is needed for a row whose texts spell no control token.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HIDDEN, MARKED = 0xF0000, 0x100000
NEVER = "(?!)"


@dataclass(frozen=True)
class Controls:
    """The control tokens of a tokenizer by their texts."""

    ids: Mapping[str, int]
    """Their ids; a text's place in this mapping is the number of its private-use characters."""
    unknown_id: int | None
    """The id among them that a tokenizer also gives to characters which it does not know."""
    pattern: re.Pattern[str]
    """Matches any of them, the longest that fits."""
    stops: re.Pattern[str]
    """Matches the stop tokens among them."""
    closing: re.Pattern[str]
    """Matches the stop token that ends a text, as group 1, and what follows it: white space and further stop tokens."""


def make_controls(tokenizer: Any, stop_ids: Sequence[int]) -> Controls:
    """Returns the control tokens: the special tokens of the tokenizer and its tokens for `stop_ids`."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    known = [number for number in stop_ids if number < len(tokenizer)]
    stops = dict(zip(tokenizer.convert_ids_to_tokens(known), known, strict=True))
    ids = {str(text): number for text, number in (added | dict(named) | stops).items() if text}
    either = _any_of(stops)
    closing = re.compile(rf"({either})(?:\s|{either})*\Z")
    return Controls(ids, tokenizer.unk_token_id, re.compile(_any_of(ids)), re.compile(either), closing)


def _any_of(texts: Collection[str]) -> str:
    """Returns a pattern that matches the longest of some texts. Equal beginnings stand in it once: Gemma has 6,000
    control tokens that begin with "<", each of which would be tried at every "<" of a text.
    """
    rests: dict[str, list[str]] = {}
    for text in filter(None, texts):
        rests.setdefault(text[0], []).append(text[1:])
    branches = [re.escape(first) + (_any_of(rest) if any(rest) else "") for first, rest in rests.items()]
    return f"(?:{'|'.join(branches)}){'?' if '' in texts else ''}" if branches else NEVER


def spells_control(controls: Controls, value: Any) -> bool:
    """Returns whether a text of a message, of a list or of a mapping (its values) spells a control token."""
    if isinstance(value, str):
        return controls.pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(spells_control(controls, item) for item in value.values())
    return isinstance(value, list | tuple) and any(spells_control(controls, item) for item in value)


# --- hidden, revealed, marked ----------------------------------------------------------------------------------------


def hide(controls: Controls, value: Any) -> Any:
    """Returns a copy of a text, list or mapping in which the text of each control token is one hidden character."""
    if isinstance(value, str):
        return controls.pattern.sub(_numbered(controls, HIDDEN), value)
    if isinstance(value, Mapping):
        return {key: hide(controls, item) for key, item in value.items()}
    return [hide(controls, item) for item in value] if isinstance(value, list | tuple) else value


def reveal(controls: Controls, text: str) -> str:
    """Returns a text in which every hidden character is the text of its control token again."""
    return text.translate({HIDDEN + number: spelt for number, spelt in enumerate(controls.ids)})


def mark(controls: Controls, text: str) -> str:
    """Returns a text in which each control token is its mark."""
    return controls.pattern.sub(_numbered(controls, MARKED), text)


def unmark(controls: Controls, text: str) -> str:
    """Returns a text in which every mark is the text of its control token again."""
    return text.translate({MARKED + number: spelt for number, spelt in enumerate(controls.ids)})


def marks(controls: Controls) -> dict[str, int]:
    """Returns the marks, each with the id of its control token."""
    return {chr(MARKED + number): token for number, token in enumerate(controls.ids.values())}


def is_as_marked(controls: Controls, text: str, ids: Sequence[int]) -> bool:
    """Returns whether the control tokens in the ids of a marked text are its marks, so that none was made of plain
    text, as a tokenizer may do whose vocabulary has it as a word too.
    """
    codes = {sign: number for sign, number in marks(controls).items() if number != controls.unknown_id}
    found = set(codes.values())
    return [number for number in ids if number in found] == [codes[sign] for sign in text if sign in codes]


def _numbered(controls: Controls, first: int) -> Callable[[re.Match[str]], str]:
    numbers = {spelt: number for number, spelt in enumerate(controls.ids)}
    return lambda found: chr(first + numbers[found[0]])
