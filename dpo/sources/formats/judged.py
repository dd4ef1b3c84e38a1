"""Formats whose rows hold answers and a judgement of them: a winner, votes, a signed preference, ranks or ratings."""

import json
from collections.abc import Collection, Mapping, Sequence

from dpo.base.errors import InvalidValue
from dpo.sources.formats.example import Example, Index
from dpo.sources.formats.listed import grouped
from dpo.sources.formats.numbers import number_of, whole_number
from dpo.sources.formats.pairwise import answer_of, preference
from dpo.sources.formats.published import HH_ANSWER
from dpo.sources.formats.row_fields import (
    ASSISTANT,
    Message,
    Row,
    field,
    list_of,
    mapping,
    messages_of,
    shown,
    text_of,
    text_or_messages,
)

ANSWERS = (
    ("response_a", "response_b"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response0", "response1"),
    ("response1", "response2"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
)
"""The columns of two answers; a row has one of these pairs."""
WINNERS = ("winner", "better_response_id")
"""The columns that name the better answer; a row has one of them, or VOTES."""
VOTES = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": None}
"""The columns of which one is 1 and the others 0, and the index of the answer that is then the better one."""
TIES = ("tie", "both_bad", "tie (bothbad)", "tie (both bad)", "draw")
"""The values of a column of WINNERS for two answers of which none is better, besides the names of the answers."""
LISTS = ("completions", "responses", "generations")
"""The columns of rated answers; a row has one of them."""

Winner = int | None
"""The index of the better one of two answers; None: a tie."""
PAIRS: Mapping[Winner, tuple[tuple[Index, ...], tuple[str, ...]]] = {
    0: (((0, 1),), ()),
    1: (((1, 0),), ()),
    None: ((), ("tie",)),
}
"""The pairs of two answers, and the reasons of the dropped ones."""
TIE, NOT_UNICODE = (Example("", (), (), (reason,)) for reason in ("tie", "not_unicode"))


def judged(row: Row) -> Example:
    """Reads a prompt, two answers (ANSWERS), and the better one by name (WINNERS) or by VOTES.

    The prompt is a text, or messages; or a list of the user's turns, also as a JSON text, and so are the answers then.
    Of conversations with several turns the pair is the last one: where the answers before it differ, so do the prompts.

    Among such sets are PKU-SafeRLHF (https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF), with
    better_response_id, and the arena's 55k conversations
    (https://huggingface.co/datasets/lmarena-ai/arena-human-preference-55k), with votes and JSON texts of turns.
    """
    names = _present(row, ANSWERS)
    winner = _vote(row) if any(name in row for name in VOTES) else _named(row, names)
    prompt, answers = field(row, "prompt"), {name: field(row, name) for name in names}
    turns = _turns(prompt)
    if turns is None:
        return _example(prompt, answers, winner)
    a, b = (_conversation(turns, value, name) for name, value in answers.items())
    return _better_conversation(a, b, winner) if _is_unicode(a + b) else NOT_UNICODE


def arena(row: Row) -> Example:
    """Reads two whole conversations {conversation_a, conversation_b} and the winner.

    The arena's sets, such as https://huggingface.co/datasets/lmsys/chatbot_arena_conversations; see `judged` for turns.
    """
    winner = _named(row, ("conversation_a", "conversation_b"))
    a, b = (list(messages_of(field(row, name), name)) for name in ("conversation_a", "conversation_b"))
    return _better_conversation(a, b, winner)


def helpsteer(row: Row) -> Example:
    """Reads HelpSteer3's {context, response1, response2, overall_preference}: messages, two texts, and -3 (the first is
    much better) to 3 (the second is); 0 is a tie.

    https://huggingface.co/datasets/nvidia/HelpSteer3, its configuration `preference`.
    """
    score = whole_number(field(row, "overall_preference"), "overall_preference", range(-3, 4))
    winner = None if score == 0 else int(score > 0)
    answers = {name: field(row, name) for name in ("response1", "response2")}
    return _example(list(messages_of(field(row, "context"), "context")), answers, winner)


def nectar(row: Row) -> Example:
    """Reads {prompt, answers} with answers [{answer, rank, …}], rank 1 the best; the prompt is a dialogue in one text
    that ends "\\n\\nAssistant: ", of which an answer gets the space.

    https://huggingface.co/datasets/berkeley-nest/Nectar
    """
    prompt = text_of(field(row, "prompt"), "prompt").rstrip(" ")
    if not prompt.endswith(HH_ANSWER):
        raise InvalidValue(f"prompt does not end {HH_ANSWER!r}", "\\n\\nHuman: …\\n\\nAssistant: ")
    answers, scores = [], []
    for i, value in enumerate(list_of(field(row, "answers"), "answers")):
        answer, place = mapping(value, f"answers[{i}]"), f"answers[{i}]."
        answers.append(" " + text_of(field(answer, "answer", place), f"{place}answer"))
        scores.append(-number_of(field(answer, "rank", place), f"{place}rank"))
    return grouped({"prompt": prompt, "completions": answers, "scores": scores})


def rated(row: Row) -> Example:
    """Reads a prompt, a list of answers (LISTS) and their ratings, higher is better."""
    (name,) = _present(row, [(name,) for name in LISTS])
    ratings = list_of(field(row, "ratings"), "ratings")
    scores = [number_of(value, f"ratings[{i}]") for i, value in enumerate(ratings)]
    return grouped({"prompt": field(row, "prompt"), "completions": list_of(row[name], name), "scores": scores})


# --- the better answer ------------------------------------------------------------------------------------------------


def _present(row: Row, options: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the one option whose columns the row all has."""
    given = [names for names in options if all(name in row for name in names)]
    if len(given) != 1:
        found = " and ".join(", ".join(names) for names in given)
        raise InvalidValue(f"{found or 'nothing'} given", f"one of {'; '.join(', '.join(names) for names in options)}")
    return given[0]


def _vote(row: Row) -> Winner:
    """Returns the better answer by the column of VOTES that is 1."""
    given = [name for name in VOTES if name in row and whole_number(row[name], name, range(2)) == 1]
    if len(given) != 1:
        raise InvalidValue(f"1 in {' and '.join(given) or 'none'} of {', '.join(VOTES)}", "1 in one of them")
    return VOTES[given[0]]


def _named(row: Row, names: Sequence[str]) -> Winner:
    """Returns the better one of two answers by the row's column of WINNERS.

    Its value is the name of an answer (`response_a`), the end of the name (`a`; 1 of `response1`), `model_a` or
    `model_b`, or one of TIES, and of answers a and b 0 or 1; case, spaces, underscores and brackets do not matter.
    """
    (column,) = _present(row, [(name,) for name in WINNERS])
    choices: dict[str, Winner] = {_plain(tie): None for tie in TIES}
    for i, (name, letter) in enumerate(zip(names, "ab", strict=True)):
        digit = str(i) if name[-1] == letter else name[-1]
        choices |= dict.fromkeys((_plain(name), f"model{letter}", letter, digit), i)
    if _plain(row[column]) not in choices:
        valid = ", ".join([*(name[-1] for name in names), *names, "model_a", "model_b", *TIES])
        raise InvalidValue(f"{column} is {shown(row[column])}", valid)
    return choices[_plain(row[column])]


def _plain(value: object) -> str:
    """Returns a text in small letters without spaces, underscores and brackets; a whole number by its digits."""
    return str(value).casefold().translate(dict.fromkeys(map(ord, " _()"))).removesuffix(".0")


# --- the example ------------------------------------------------------------------------------------------------------


def _example(prompt: object, answers: Mapping[str, object], winner: Winner) -> Example:
    """Returns the example of a prompt and two answers, by their names in the row."""
    prompt = text_or_messages(prompt, "prompt")
    completions = tuple(answer_of(value, name, prompt) for name, value in answers.items())
    return Example(prompt, completions, *PAIRS[winner])


def _better_conversation(a: list[Message], b: list[Message], winner: Winner) -> Example:
    """Returns the example of two whole conversations."""
    if winner is None:
        return TIE
    return preference(dict(zip(("chosen", "rejected"), (a, b) if winner == 0 else (b, a), strict=True)))


def _turns(value: object) -> list[str] | None:
    """Returns the texts of a list of turns, also one in a JSON text; null is an empty text. None for another value."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not (isinstance(value, list) and value and all(isinstance(turn, str | None) for turn in value)):
        return None
    return [turn or "" for turn in value]


def _conversation(turns: list[str], value: object, name: str) -> list[Message]:
    """Returns the conversation of the user's turns and an answer's, which must be as many."""
    answers = _turns(value)
    if answers is None or len(answers) != len(turns):
        what = shown(value) if answers is None else f"a list of {len(answers)} turns"
        raise InvalidValue(f"{name} is {what}", f"a list of {len(turns)} texts, as prompt is, or its JSON text")
    messages: list[Message] = []
    for turn, answer in zip(turns, answers, strict=True):
        messages += [{"role": "user", "content": turn}, {"role": ASSISTANT, "content": answer}]
    return messages


def _is_unicode(conversation: list[Message]) -> bool:
    """Returns whether no text has half a surrogate pair, which JSON can escape and no tokenizer takes."""
    try:
        json.dumps(conversation, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
