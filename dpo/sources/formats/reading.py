"""`Reading`, the way in which the rows of a source are read; a raw row -> `Example`.

A raw row -> its columns by known names -> messages that are kept as text -> the format's reader -> messages, where
texts are read as conversations -> the system message and the arguments of the chat template.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as default
from typing import Any

from dpo.base.errors import InvalidValue, UserError
from dpo.sources.formats.chat import as_conversation, system_text, template_args, with_system
from dpo.sources.formats.columns import PROMPT_LIKE, ROW, Names
from dpo.sources.formats.example import Example
from dpo.sources.formats.examples import FORMATS, to_example
from dpo.sources.formats.json_rows import EMPTY
from dpo.sources.formats.json_text import ends_with_answer, messages_in
from dpo.sources.formats.judged import ANSWERS, LISTS
from dpo.sources.formats.row_fields import Row, few, field, text_of, text_or_messages

ANSWER_FIELDS = ("chosen", "rejected", "completion", *LISTS, *(name for names in ANSWERS for name in names))
TEXT_OR_MESSAGES = ("prompt", *ANSWER_FIELDS)
"""The fields that are texts or messages. Messages may be kept as text, in all rows of a source or in none."""


@dataclass(frozen=True)
class Reading:
    """The way in which the rows of a source are read."""

    format: str
    """A key of `FORMATS`."""
    names: Names
    """The source's own name of each column that is read, by the name that the formats know."""
    prompt_from: tuple[str, ...] = ()
    """The known names of the columns that are the prompt; empty where `prompt` is."""
    messages_as_text: tuple[str, ...] = ()
    """The fields of TEXT_OR_MESSAGES whose messages are kept as text."""
    is_text: bool | None = None
    """Whether the first row is of texts; None where it is of token ids, broken, or has no completion."""
    chat_reason: str = ""
    """The reason for which texts are read as conversations; empty where they stay texts."""
    template_args: Mapping[str, Any] = default(default_factory=dict)
    """The source's arguments of the chat template; those of a row take precedence."""
    null_is_missing: bool = False
    """Whether the source has columns with types, in which a key that an object lacks is null."""
    line: str = ""
    """The reading for people."""

    @property
    def own_columns(self) -> frozenset[str]:
        """Returns the source's own names of the columns that are read."""
        return frozenset(self.names.values())

    @property
    def arguments(self) -> frozenset[str]:
        """Returns the names of the source's arguments of the chat template, and `tools` where rows have them."""
        return frozenset(self.template_args) | ({"tools"} & self.names.keys())

    def content(self) -> str:
        """Returns a text that is equal only for readings that read every row alike. The order of keys stays: a template
        writes the keys of a tool in their order.
        """
        return json.dumps(vars(self), default=str)


def check_template(reading: Reading, has_template: bool, place: str) -> None:
    """Raises UserError where texts are read as conversations and the tokenizer has no chat template.

    Args:
        reading: the reading of the source.
        has_template: whether the tokenizer has a chat template.
        place: the source, for the error.
    """
    if reading.chat_reason and not has_template:
        what = f"texts are read as conversations, since {reading.chat_reason}, but the tokenizer has no chat template"
        names = [reading.names[name] for name in ROW if name in reading.names]
        unused = f", or columns: {{unused: {', '.join(names)!r}}} to leave out what is not read" if names else ""
        raise UserError(place, what, f"a model.tokenizer with one{unused}")


def read_row(reading: Reading, record: Row) -> Example:
    """Returns a row as its source is read. Raises InvalidValue where it is broken."""
    try:
        return _example(reading, known_row(record, reading.names, reading.null_is_missing))
    except InvalidValue as fault:
        raise InvalidValue(fault.what + _own_names(reading, fault.what), fault.valid) from fault


def known_row(record: Row, names: Names, null_is_missing: bool) -> Row:
    """Returns the columns of a raw row that are not null, by the names that the formats know.

    Args:
        record: the row as the source has it.
        names: the source's own names of the columns, by known names.
        null_is_missing: `Reading.null_is_missing`.
    """
    known = {own: name for name, own in names.items()}
    row = {known[own]: value for own, value in record.items() if own in known and value is not None}
    return without_nulls(row) if null_is_missing else row


def with_prompt(row: Row, prompt_from: tuple[str, ...]) -> Row:
    """Returns the row with the prompt of its columns: one value, or the texts of two that are not blank, with a line
    feed between them. Raises InvalidValue where one of two is no text.
    """
    given = [name for name in prompt_from if name in row]
    if len(given) < 2:
        return {**row, "prompt": row[given[0]]} if given else row
    texts = [text_of(row[name], name) for name in given]
    return {**row, "prompt": "\n".join(text for text in texts if text.strip())}


def with_messages(row: Row, names: tuple[str, ...]) -> Row:
    """Returns the row with the messages of some fields that are kept as text. Raises InvalidValue for another text."""
    return {key: _messages(value, key) if key in names else value for key, value in row.items()}


def is_kept_as_text(value: object) -> bool:
    """Returns whether a value, or each item of a list, is a text that holds messages."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(messages_in(item) is not None for item in items)


def prompt_alone(row: Row) -> Example:
    """Returns a row without answers as training reads its prompt: messages may be kept as JSON text, and beside
    `system`, `tools` or `chat_template_kwargs` a text is a conversation.

    Raises InvalidValue for another value, and where a further column looks like part of the prompt.
    """
    given = {name: value for name, value in row.items() if value not in EMPTY}
    beside = sorted(name for name in given if name.lower() in PROMPT_LIKE and name not in ROW)
    if beside:
        valid = f"prompt, {', '.join(ROW)}"
        raise InvalidValue(f"{few(beside)}: would not be read, but looks like part of the prompt", valid)
    (prompt,) = with_messages({"prompt": field(row, "prompt")}, ("prompt",) * is_kept_as_text(row["prompt"])).values()
    example = Example(text_or_messages(prompt, "prompt"), (), ())
    if isinstance(example.prompt, str):
        return _with_template(as_conversation(example), given, {}) if given.keys() & set(ROW) else example
    return _with_template(example, given, {})


def _with_template(example: Example, row: Row, of_source: Mapping[str, Any]) -> Example:
    """Returns an example of messages with the row's system message and arguments of the chat template."""
    return replace(with_system(example, system_text(row)), template_args=template_args(row, of_source))


def without_nulls(value: Any) -> Any:
    """Returns a value without the keys of objects that are null, at any depth; a message keeps its `content`."""
    if isinstance(value, list):
        return value if isinstance(next(iter(value), 0), int | str) else [without_nulls(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    kept = {key: item for key, item in value.items() if item is not None or (key == "content" and "role" in value)}
    return {key: without_nulls(item) for key, item in kept.items()}


# --- a row by known names -> Example ----------------------------------------------------------------------------------


def _example(reading: Reading, row: Row) -> Example:
    row = with_messages(with_prompt(row, reading.prompt_from), reading.messages_as_text)
    _check_texts(reading, row)
    example = to_example(reading.format, row)
    if FORMATS[reading.format].holds_ids or not example.completions:
        return example
    example = _of_one_kind(reading, example)
    if isinstance(example.prompt, str):
        return example
    if example.prompt[-1] in example.completions:
        raise InvalidValue("the prompt ends with an answer of the row itself", "a prompt that ends before the answers")
    return _with_template(example, row, reading.template_args)


def _of_one_kind(reading: Reading, example: Example) -> Example:
    """Returns the example as a conversation where its source is read so. Raises InvalidValue for a text among
    conversations, and the reverse.
    """
    is_text = isinstance(example.prompt, str)
    if is_text and reading.chat_reason:
        return as_conversation(example)
    if is_text != reading.is_text and reading.is_text is not None and not reading.chat_reason:
        kinds = ("a text", "messages") if is_text else ("messages", "a text")
        valid = "one kind per source, or as_chat: true"
        raise InvalidValue(f"the prompt is {kinds[0]}, that of the source's first row {kinds[1]}", valid)
    return example


def _check_texts(reading: Reading, row: Row) -> None:
    """Raises InvalidValue for a text that holds messages, where the source's first row has texts."""
    for name in set(TEXT_OR_MESSAGES) & row.keys() - set(reading.messages_as_text):
        for item in row[name] if isinstance(row[name], list) else [row[name]]:
            messages = messages_in(item)
            if messages and (name == "prompt" or ends_with_answer(messages)):
                what = f"{name} holds messages, kept as JSON text; in the source's first row it does not"
                raise InvalidValue(what, "one kind per source")


def _messages(value: object, name: str) -> object:
    """Returns the messages that a text holds, or each text of a list."""
    if isinstance(value, list):
        return [_messages(item, name) if isinstance(item, str) else item for item in value]
    messages = messages_in(value)
    if isinstance(value, str) and messages is None:
        what = f"{name} is a text without messages; in the source's first row it holds messages, kept as JSON text"
        raise InvalidValue(what, "one kind per source")
    return value if messages is None else messages


def _own_names(reading: Reading, what: str) -> str:
    """Returns an addition to an error that names the source's own columns; empty where they have the known names."""
    own = {known: own for known, own in reading.names.items() if known != own}
    own |= {"prompt": " and ".join(reading.names[name] for name in reading.prompt_from)} if reading.prompt_from else {}
    told = [f"{known} is the column {name}" for known, name in own.items() if re.search(rf"\b{known}\b", what)]
    return f" ({'; '.join(told)})" if told else ""
