"""An example of texts -> messages of a conversation; the system message and the template's arguments of a row."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpo.base.errors import InvalidValue
from dpo.sources.formats.example import Example
from dpo.sources.formats.json_rows import EMPTY
from dpo.sources.formats.row_fields import ASSISTANT, Message, Row, list_of, mapping, text_of

TURN = re.compile(r"\n\n(Human|Assistant):")
"""The marks of a dialogue in one text, as `hh` and `shp` write it."""
ROLES = {"Human": "user", "Assistant": ASSISTANT}
OF_THE_TRAINER = ("add_generation_prompt", "continue_final_message", "conversation", "messages", "return_dict",
                  "return_tensors", "tokenize")  # fmt: skip
"""Arguments of `apply_chat_template` that a row or source cannot give."""


def as_conversation(example: Example) -> Example:
    """Returns an example of texts as messages of the user and the assistant.

    The prompt is the user's message, unless it is a dialogue with the marks `Human:` and `Assistant:`, whose turns
    become messages. A space that joins an answer to its prompt is left out; other white space is kept.
    """
    assert isinstance(example.prompt, str)
    answers = tuple({"role": ASSISTANT, "content": _unjoined(str(text))} for text in example.completions)
    return replace(example, prompt=as_messages(example.prompt), completions=answers)


def as_messages(prompt: str) -> tuple[Message, ...]:
    """Returns the messages of a prompt: the turns of a dialogue that ends where the assistant begins, else one. Raises
    InvalidValue for a dialogue that does not begin with a mark.
    """
    preface, *parts = TURN.split(prompt)
    if not parts or parts[-1].strip() or parts[-2] != "Assistant" or "Human" not in parts[::2]:
        return ({"role": "user", "content": prompt},)
    if preface.strip():
        raise InvalidValue(f"the dialogue begins with {preface[:40]!r}", "'\\n\\nHuman:' at its beginning")
    turns = zip(parts[:-2:2], parts[1:-2:2], strict=True)
    return tuple({"role": ROLES[speaker], "content": _unjoined(text)} for speaker, text in turns)


def _unjoined(text: str) -> str:
    """Returns a text without the one space that joins it to the text before; indented text is left as it is."""
    return text[1:] if text[:1] == " " and not text[1:2].isspace() else text


def with_system(example: Example, text: str) -> Example:
    """Returns the example with a system message first, unless the conversation begins with the same one.

    Args:
        example: an example of messages.
        text: the row's `system`; a blank one is none.

    Raises:
        InvalidValue: the conversation begins with another system message.
    """
    first = example.prompt[0]
    assert isinstance(first, Mapping)
    if not text.strip() or (first["role"] in ("system", "developer") and first["content"] == text):
        return example
    if first["role"] in ("system", "developer"):
        what = f"system is {text[:40]!r}, the conversation's own system message {str(first['content'])[:40]!r}"
        raise InvalidValue(what, "one system message per row, or columns: {unused: system} for the conversation's own")
    return replace(example, prompt=({"role": "system", "content": text}, *example.prompt))


def template_args(row: Row, of_source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the chat template for a row: its `chat_template_kwargs` and `tools`, over those of the
    source. Raises InvalidValue for a wrong value.
    """
    given = row.get("chat_template_kwargs")
    given = {} if given in EMPTY else mapping(given, "chat_template_kwargs")
    check_args(given, "chat_template_kwargs")
    tools = _tools(row.get("tools"))
    return {**of_source, **given, **({"tools": tools} if tools else {})}


def check_args(args: Mapping[str, Any], name: str) -> None:
    """Raises InvalidValue for an argument of the chat template that only the trainer gives."""
    wrong = sorted(args.keys() & set(OF_THE_TRAINER))
    if wrong:
        raise InvalidValue(f"{name}.{wrong[0]} is given by the trainer", "arguments that the chat template reads")


def _tools(value: object) -> list[Row]:
    """Returns the tools of a row, a list of objects, each of which may be kept as JSON text."""
    if value in EMPTY or (isinstance(value, str) and not value.strip()):
        return []
    return [mapping(item, f"tools[{i}]") for i, item in enumerate(list_of(value, "tools"))]


def system_text(row: Row) -> str:
    """Returns the row's `system`, "" where it has none. Raises InvalidValue where it is no text."""
    return text_of(row.get("system", ""), "system")
