"""The format of demonstrations: an answer per row, with which no other answer is compared."""

from dpo.data.formats.example import Example
from dpo.data.formats.pairwise import answer_of, split_conversation
from dpo.data.formats.row_fields import Row, field, text_or_messages


def demonstrations(row: Row) -> Example:
    """Reads {prompt, completion}, {prompt, chosen}, or {messages}: a whole conversation, which ends with the answer.

    The only pair has the answer as winner and as loser.
    """
    if "messages" in row:
        prompt, answer = split_conversation(field(row, "messages"), "messages")
        return Example(prompt, (answer,), ((0, 0),))
    name = "completion" if "completion" in row else "chosen"
    text = text_or_messages(field(row, "prompt"), "prompt")
    return Example(text, (answer_of(field(row, name), name, text),), ((0, 0),))
