"""Lists, objects and conversations that a file keeps as text: a column of a CSV file or of a table.

A text is read as JSON, or as Python writes a list: `pandas` leaves that in a CSV file of a column of lists (with a
comma between two items) or of numpy arrays (with a line end there).
"""

import ast
import json
import re
import warnings
from typing import Any

NUMPY_SEPARATOR = re.compile(r"\}\s*\n\s*\{")
"""Between two items of a printed numpy array of objects. No text inside of it has a line end that is not escaped."""

BEGIN_OF_MESSAGES = re.compile(
    r"""[\s"]*(\{\s*\\*["']messages\\*["']\s*:\s*)?\[\s*\{\s*\\*["'](role|content|from|value)\\*["']\s*:"""
)
ROLE_OF_ANSWER = re.compile(r"""["'](role|from)\\*["']\s*:\s*\\*["'](assistant|gpt)\\*["']""")


def decoded(value: Any, kind: type) -> Any:
    """Returns the list or object that a text holds; any other value, or a text that holds none, as it is.

    Args:
        value: the value of a field.
        kind: list or dict.
    """
    if not isinstance(value, str) or value.lstrip()[:1] != ("[" if kind is list else "{"):
        return value
    for parse in (json.loads, _python_value):
        try:
            result = parse(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(result, kind):
            return result
    return value


def messages_in(value: Any) -> list[Any] | dict[str, Any] | None:
    """Returns the messages, or the one message, that a text holds; None for another text or value."""
    if not isinstance(value, str):
        return None
    result = decoded(decoded(value, list), dict)
    items = result if isinstance(result, list) else [result]
    return result if items and all(map(_is_message, items)) else None


def is_broken_messages(value: Any) -> bool:
    """Returns whether a text begins as messages that are kept as text, and has an answer, but cannot be read.

    Such texts are JSON that was cut or encoded twice, messages inside of an object, and messages that Python printed
    with a `nan` or an array among their values.
    """
    if not isinstance(value, str) or messages_in(value) is not None:
        return False
    return BEGIN_OF_MESSAGES.match(value) is not None and ROLE_OF_ANSWER.search(value) is not None


def ends_with_answer(messages: list[Any] | dict[str, Any]) -> bool:
    """Returns whether the last of the messages is the assistant's."""
    last = messages[-1] if isinstance(messages, list) else messages
    return last.get("role", last.get("from")) in ("assistant", "gpt", "chatgpt")


def _is_message(value: Any) -> bool:
    """Returns whether a value is an object like {role, content}, {role, tool_calls} or {from, value}."""
    if not isinstance(value, dict):
        return False
    return ("role" in value and ("content" in value or "tool_calls" in value)) or ("from" in value and "value" in value)


def _python_value(text: str) -> Any:
    """Returns the value of a Python literal, which may be a printed numpy array of objects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns about escape sequences
        return ast.literal_eval(NUMPY_SEPARATOR.sub("}, {", text))
