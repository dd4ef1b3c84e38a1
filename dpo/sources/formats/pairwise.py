"""Formats whose rows hold one chosen and one rejected answer, as text or as messages of a conversation."""

from collections.abc import Iterable, Mapping

from dpo.base.errors import InvalidValue
from dpo.sources.formats.example import PROMPTS_DIFFER, Example
from dpo.sources.formats.row_fields import (
    ASSISTANT,
    Message,
    Row,
    answer_message,
    field,
    messages_of,
    text_of,
    text_or_messages,
)


def sharegpt(row: Row) -> Example:
    """Reads {conversations, chosen, rejected}, whose messages have `from` and `value`, as `preference`."""
    return preference({**row, "prompt": list(messages_of(field(row, "conversations"), "conversations"))})


def preference(row: Row) -> Example:
    """Reads {prompt, chosen, rejected} as text or chat, or chosen and rejected as whole conversations.

    A whole conversation holds the prompt: all its messages but the last. A `prompt` text beside it must occur in one of
    its messages, and is not used (sets like UltraFeedback repeat the question there). A `prompt` of messages must be
    the conversation's own, or be the whole of chosen or rejected (the column `messages` of such sets). Beside answers
    of one message each, a `prompt` text is the user's message.
    """
    chosen, rejected, prompt = field(row, "chosen"), field(row, "rejected"), row.get("prompt")
    if all(isinstance(answer, list) and (prompt is None or len(answer) > 1) for answer in (chosen, rejected)):
        return _conversations(chosen, rejected, prompt)
    prompt = text_or_messages(field(row, "prompt"), "prompt")
    if isinstance(prompt, str) and all(isinstance(answer, list | Mapping) for answer in (chosen, rejected)):
        prompt = ({"role": "user", "content": prompt},)
    return Example(prompt, (answer_of(chosen, "chosen", prompt), answer_of(rejected, "rejected", prompt)), ((0, 1),))


# --- completions and conversations -----------------------------------------------------------------------------------


def answer_of(value: object, name: str, prompt: str | Iterable[Message]) -> str | Message:
    """Returns a completion of the same kind as the prompt; a text after a prompt of messages is the assistant's.

    Args:
        value: the field's value: a text, a message, or a list with one message.
        name: the field's name, for errors.
        prompt: the prompt, whose kind decides.

    Raises:
        InvalidValue: the value is of another kind, or the message is not the assistant's.
    """
    if isinstance(prompt, str):
        return text_of(value, name)
    if isinstance(value, str):
        return {"role": ASSISTANT, "content": value}
    return answer_message(value, name)


def _conversations(chosen: object, rejected: object, prompt: object) -> Example:
    """Reads two whole conversations, each with at least one message before the answer."""
    (context, answer), (other, worse) = (
        split_conversation(v, k) for v, k in ((chosen, "chosen"), (rejected, "rejected"))
    )
    own = (context, other, (*context, answer), (*other, worse))
    if isinstance(prompt, list) and messages_of(prompt, "prompt") not in own:
        raise InvalidValue("chosen and rejected do not begin with prompt", "whole conversations or one answer each")
    if isinstance(prompt, str) and not _occurs(prompt, (*context, answer, *other, worse)):
        what = "prompt does not occur in chosen and rejected, which are whole conversations"
        raise InvalidValue(what, "columns: {unused: NAME} to leave it out, or {system: NAME}")
    return Example(context, (answer, worse), ((0, 1),)) if context == other else PROMPTS_DIFFER


def _occurs(text: str, messages: Iterable[Message]) -> bool:
    """Returns whether a text occurs in a message, whatever white space is between its words."""
    return any(" ".join(text.split()) in " ".join((message.get("content") or "").split()) for message in messages)


def split_conversation(value: object, name: str) -> tuple[tuple[Message, ...], Message]:
    """Returns the prompt and the answer of a conversation: all messages but the last, and the last.

    Args:
        value: the field's value.
        name: the field's name, for errors.

    Raises:
        InvalidValue: the value is no list of at least two messages, or the last is not the assistant's.
    """
    messages = messages_of(value, name)
    if len(messages) < 2:
        raise InvalidValue(f"{name} has one message", "a whole conversation, or a prompt of messages beside it")
    return messages[:-1], answer_message(messages[-1], f"{name}[{len(messages) - 1}]")
