"""Reads the fields of a row and checks their types.

Every function here raises InvalidValue for a wrong value; its argument `name` is the field's name in the message.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from dpo.base.errors import InvalidValue
from dpo.sources.formats.json_text import decoded

Message = Mapping[str, Any]
"""A message of a conversation as the chat template reads it: role, content, and tool_calls, name, ... where it has
them."""
Row = Mapping[str, Any]
"""A raw row: the value of each field by its name."""

ASSISTANT = "assistant"
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "chatgpt": ASSISTANT, "system": "system",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip
"""The role of each sender of ShareGPT's messages; `function` is its result."""
SPEAKERS = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT}
"""Names of ShareGPT's senders that also stand as roles of {role, content}, where a template would write them."""
FUNCTION_CALL = "function_call"
"""The sender of a message whose text is a call of a function, the assistant's."""
NUM_NAMES = 8
"""The number of names that a list of columns shows."""


def few(names: Iterable[str]) -> str:
    """Returns some names for a line, and their number where there are more."""
    names = [name if len(name) <= 60 else f"{name[:60]}…" for name in names]
    return ", ".join(names) if len(names) <= NUM_NAMES + 2 else f"{', '.join(names[:NUM_NAMES])}, … ({len(names):,})"


def field(row: Row, name: str, prefix: str = "") -> Any:
    """Returns a field's value, which must not be null.

    Args:
        row: the row, or an object inside it.
        name: the field's name.
        prefix: the place of `row` in a larger one, for errors, such as `messages[0].`.

    Raises:
        InvalidValue: the field is missing or null.
    """
    value = row.get(name)
    if value is None:
        raise InvalidValue(f"missing or null field {prefix}{name}; the row has: {few(row) or 'nothing'}")
    return value


def text_of(value: object, name: str) -> str:
    """Returns the value, which must be a text."""
    if not isinstance(value, str):
        raise InvalidValue(f"{name} is {shown(value)}", "a text")
    return value


def list_of(value: object, name: str) -> list[Any]:
    """Returns the value, which must be a list, also one that is kept as text."""
    value = decoded(value, list)
    if not isinstance(value, list):
        raise InvalidValue(f"{name} is {shown(value)}", "a list")
    return value


def mapping(value: object, name: str) -> Row:
    """Returns the value, which must be an object, also one that is kept as text."""
    value = decoded(value, dict)
    if not isinstance(value, Mapping):
        raise InvalidValue(f"{name} is {shown(value)}", "an object")
    return value


def token_ids(value: object, name: str) -> tuple[int, ...]:
    """Returns the token ids of a list of whole numbers; whether they are in the vocabulary is checked later."""
    ids = list_of(value, name)
    for i, token in enumerate(ids):
        if type(token) is not int:
            raise InvalidValue(f"{name}[{i}] is {shown(token)}", "a token id")
    return tuple(ids)


def shown(value: object) -> str:
    """Returns the kind of a value for an error, followed by the value where that is short."""
    kinds = {type(None): "null", dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    kind = kinds.get(type(value), "a number")
    return f"{kind} ({value!r})" if len(repr(value)) <= 40 else kind


def chat_message(value: object, name: str) -> Message:
    """Returns a message whole, with its role and its content as a text; keys that are null are left out.

    The content may be null beside `tool_calls`. Messages of ShareGPT, with `from` and `value`, become {role, content}.

    Args:
        value: an object with `role` and `content`, or with `from` and `value`.
        name: the field's name, for errors.

    Raises:
        InvalidValue: a key is missing or of another type, or the content has a part that is no text.
    """
    row = mapping(value, name)
    row = _of_sharegpt(row, name) if "from" in row and "role" not in row else row
    message = {key: item for key, item in row.items() if item is not None and (key != "tool_calls" or item != [])}
    role = text_of(field(message, "role", f"{name}."), f"{name}.role")
    message["role"] = SPEAKERS.get(role, role)
    if "tool_calls" in message:
        message["tool_calls"] = list_of(message["tool_calls"], f"{name}.tool_calls")
    if "content" not in message and "tool_calls" in message:
        return message | ({"content": None} if "content" in row else {})
    return message | {"content": _content_of(field(message, "content", f"{name}."), f"{name}.content")}


def _content_of(value: object, name: str) -> str:
    """Returns the content of a message: a text, or the joined texts of its parts."""
    if not isinstance(value, list):
        return text_of(value, name)
    return "".join(_part_text(part, f"{name}[{i}]") for i, part in enumerate(value))


def _part_text(value: object, name: str) -> str:
    """Returns the text of a part {type: text, text}. Raises InvalidValue for an image and every other part."""
    part = mapping(value, name)
    if part.get("type", "text") != "text":
        raise InvalidValue(f"{name} is a part of the type {part['type']!r}", "parts of the type text only")
    return text_of(field(part, "text", f"{name}."), f"{name}.text")


def _of_sharegpt(row: Row, name: str) -> Row:
    """Returns the message with `role` and `content` for `from` and `value`; a `function_call` as `tool_calls`."""
    sender = text_of(field(row, "from", f"{name}."), f"{name}.from")
    rest = {key: value for key, value in row.items() if key not in ("from", "value")}
    if sender == FUNCTION_CALL:
        calls = decoded(decoded(row.get("value"), list), dict)
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, Mapping) and "name" in call for call in calls):
            raise InvalidValue(f"{name}.value is no call of a function", "JSON: {name, arguments}, or a list of them")
        return rest | {"role": ASSISTANT, "content": "", "tool_calls": [_tool_call(call) for call in calls]}
    if sender not in SHAREGPT_ROLES:
        raise InvalidValue(f"{name}.from is {sender!r}", ", ".join((*SHAREGPT_ROLES, FUNCTION_CALL)))
    value = field(row, "value", f"{name}.")
    return rest | {
        "role": SHAREGPT_ROLES[sender],
        "content": value if isinstance(value, list) else text_of(value, f"{name}.value"),
    }


def _tool_call(function: Row) -> Row:
    """Returns a call of a function {name, arguments} as an item of `tool_calls`."""
    return {"type": "function", "function": function}


def messages_of(value: object, name: str) -> tuple[Message, ...]:
    """Returns the messages of a list with at least one. Raises InvalidValue for another value."""
    messages = list_of(value, name)
    if not messages:
        raise InvalidValue(f"{name} is an empty list", "at least one message")
    return tuple(chat_message(item, f"{name}[{i}]") for i, item in enumerate(messages))


def answer_message(value: object, name: str) -> Message:
    """Returns the assistant's message, given as a message or as a list with one message. Raises InvalidValue where
    there is not exactly one message, or it has another role.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise InvalidValue(f"{name} has {len(value)} messages", "one, the assistant's")
        return answer_message(value[0], f"{name}[0]")
    answer = chat_message(value, name)
    if answer["role"] != ASSISTANT:
        raise InvalidValue(f"{name} has the role {answer['role']!r}", ASSISTANT)
    return answer


def text_or_messages(value: object, name: str) -> str | tuple[Message, ...]:
    """Returns the value as a text or as messages, by its type."""
    if not isinstance(value, str | list):
        raise InvalidValue(f"{name} is {shown(value)}", "a text or a list of messages")
    return value if isinstance(value, str) else messages_of(value, name)
