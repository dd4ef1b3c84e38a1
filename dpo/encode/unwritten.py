"""Whether a chat template writes what the messages say: it may leave out roles, tool calls or thoughts.

    messages      user "Hi", assistant calls look_up, tool "3 sheep"
    template      writes users and assistants alone: "<user>Hi<assistant><assistant>"
    left out      the name look_up and the text "3 sheep": the preference was given after both of them

The thoughts of an answer, up to "</think>", do not count: templates leave out those of earlier turns on purpose.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo.sources.formats.row_fields import Message

END_OF_THOUGHTS = "</think>"


def leaves_out(messages: Sequence[Message], text: str) -> bool:
    """Returns whether the text of messages by the chat template lacks a content, or the name of a tool that is called.

    Args:
        messages: the messages, as the template was given them.
        text: what it wrote.
    """
    return any(not _has(text, said) for message in messages for said in _said(message))


def _said(message: Message) -> Iterator[str]:
    """Yields the texts of a message and the names of the tools that it calls."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    yield from (part.rpartition(END_OF_THOUGHTS)[2] for part in parts)
    yield from (_name(call) for call in message.get("tool_calls") or ())


def _name(call: Any) -> str:
    """Returns the name of the tool of a call, {function: {name, arguments}} or {name, arguments}."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def _has(text: str, said: str) -> bool:
    """Returns whether a text holds another one, whatever white space is around and between its words."""
    return said.strip() in text or " ".join(said.split()) in " ".join(text.split())
