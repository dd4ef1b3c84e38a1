"""Reads the fields of a row and checks their types.

Every function here raises InvalidValue for a wrong value; its argument `name` is the field's name in the message.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dpo.base.errors import InvalidValue

Message = Mapping[str, str]
"""{role, content}."""
Row = Mapping[str, Any]
"""A raw row: the value of each field by its name."""

ASSISTANT = "assistant"
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "chatgpt": ASSISTANT, "system": "system",
}  # fmt: skip


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
        raise InvalidValue(f"missing or null field {prefix}{name}; the row has: {', '.join(row) or 'nothing'}")
    return value


def text_of(value: object, name: str) -> str:
    """Returns the value, which must be a text."""
    if not isinstance(value, str):
        raise InvalidValue(f"{name} is {shown(value)}", "a text")
    return value


def list_of(value: object, name: str) -> list[Any]:
    """Returns the value, which must be a list."""
    if not isinstance(value, list):
        raise InvalidValue(f"{name} is {shown(value)}", "a list")
    return value


def mapping(value: object, name: str) -> Row:
    """Returns the value, which must be an object."""
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
    """Returns {role, content} of an object with these keys; leaves out further keys."""
    row = mapping(value, name)
    return {key: text_of(field(row, key, f"{name}."), f"{name}.{key}") for key in ("role", "content")}


def sharegpt_message(value: object, name: str) -> Message:
    """Returns {role, content} of an object with the keys `from` and `value`."""
    row = mapping(value, name)
    sender = text_of(field(row, "from", f"{name}."), f"{name}.from")
    if sender not in SHAREGPT_ROLES:
        raise InvalidValue(f"{name}.from is {sender!r}", ", ".join(SHAREGPT_ROLES))
    return {"role": SHAREGPT_ROLES[sender], "content": text_of(field(row, "value", f"{name}."), f"{name}.value")}


def messages_of(
    value: object, name: str, message: Callable[[object, str], Message] = chat_message
) -> tuple[Message, ...]:
    """Returns the messages of a list with at least one.

    Args:
        value: the field's value.
        name: the field's name, for errors.
        message: reads one message: (value, name for errors) -> {role, content}.

    Raises:
        InvalidValue: the value is no list, is empty, or has an item that is no message.
    """
    messages = list_of(value, name)
    if not messages:
        raise InvalidValue(f"{name} is an empty list", "at least one message")
    return tuple(message(item, f"{name}[{i}]") for i, item in enumerate(messages))


def answer_message(value: object, name: str, message: Callable[[object, str], Message] = chat_message) -> Message:
    """Returns the assistant's message, given as a message or as a list with one message.

    Args:
        value: the field's value.
        name: the field's name, for errors.
        message: reads one message: (value, name for errors) -> {role, content}.

    Raises:
        InvalidValue: there is not exactly one message, or it has another role.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise InvalidValue(f"{name} has {len(value)} messages", "one, the assistant's")
        return answer_message(value[0], f"{name}[0]", message)
    answer = message(value, name)
    if answer["role"] != ASSISTANT:
        raise InvalidValue(f"{name} has the role {answer['role']!r}", ASSISTANT)
    return answer


def text_or_messages(value: object, name: str) -> str | tuple[Message, ...]:
    """Returns the value as a text or as messages, by its type."""
    if not isinstance(value, str | list):
        raise InvalidValue(f"{name} is {shown(value)}", "a text or a list of messages")
    return value if isinstance(value, str) else messages_of(value, name)
