"""The format of demonstrations: an answer per row, with which no other answer is compared."""

from dpo.base.errors import InvalidValue
from dpo.sources.formats.example import Example
from dpo.sources.formats.pairwise import answer_of, split_conversation
from dpo.sources.formats.row_fields import Row, field, text_or_messages

DIALOGUES = ("messages", "conversations")
"""The columns of a whole conversation; a row has one of them, or a prompt."""
ANSWERS = ("completion", "chosen")
"""The columns of the answer; a row has one of them, or its answer is the last of its messages."""


def demonstrations(row: Row) -> Example:
    """Reads {prompt, completion}, {prompt, chosen}, or {messages} or {conversations}: a whole conversation, which ends
    with the answer.

    The only pair has the answer as winner and as loser.
    """
    names = [name for name in ANSWERS if name in row]
    if len(names) == len(ANSWERS):
        raise InvalidValue("completion and chosen are given", "one of them, with columns: {unused: NAME} for the other")
    dialogue = next((name for name in DIALOGUES if name in row), None)
    if dialogue and not names:
        prompt, answer = split_conversation(row[dialogue], dialogue)
        return Example(prompt, (answer,), ((0, 0),))
    text, name = text_or_messages(field(row, "prompt"), "prompt"), names[0] if names else ANSWERS[0]
    return Example(text, (answer_of(field(row, name), name, text),), ((0, 0),))
