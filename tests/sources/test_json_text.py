"""Conversations and lists that a file keeps as text."""

import json

import numpy as np
import pytest

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.sources.formats.decision import decide_reading
from dpo.sources.formats.json_text import decoded, messages_in
from dpo.sources.formats.reading import read_row

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", 'It\'s\n"wool"'), ("assistant", "Good"), ("assistant", "Bad"))
)


def sharegpt(*messages):
    senders = {"user": "human", "assistant": "gpt"}
    return [{"from": senders[message["role"]], "value": message["content"]} for message in messages]


def numpy_text(value) -> str:
    return str(np.array(value, dtype=object))


def read(rows):
    reading = decide_reading(SourceConfig("x.jsonl"), set(rows[0]), rows[0], False, "data.train[0]")
    return [read_row(reading, row) for row in rows]


@pytest.mark.parametrize("write", [json.dumps, lambda value: json.dumps(value, indent=1), repr, numpy_text])
@pytest.mark.parametrize("as_messages", [lambda *messages: [*messages], sharegpt], ids=["role", "from"])
@pytest.mark.parametrize("prompt", [{}, {"prompt": USER["content"]}], ids=["no prompt", "a prompt"])
def test_whole_conversations(write, as_messages, prompt):
    """As JSON, as pandas writes a list to a CSV file, and as it writes a numpy array that it read from Parquet."""
    row = prompt | {"chosen": write(as_messages(USER, GOOD)), "rejected": write(as_messages(USER, BAD))}
    (example,) = read([row])
    assert (example.prompt, example.completions) == ((USER,), (GOOD, BAD))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
        {"prompt": json.dumps([USER]), "chosen": "Good", "rejected": "Bad"},
        {"prompt": json.dumps([USER]), "chosen": json.dumps(GOOD), "rejected": json.dumps(BAD)},
        {"messages": repr([USER]), "chosen": "Good", "rejected": "Bad"},
        {"conversations": json.dumps(sharegpt(USER)), "chosen": json.dumps(sharegpt(GOOD)[0]), "rejected": "Bad"},
        {"prompt": [USER], "completions": [json.dumps([GOOD]), json.dumps([BAD])], "scores": [1, 0]},
        {"prompt": json.dumps([USER]), "completions": json.dumps([GOOD, BAD]), "scores": "[1, 0]"},
        {"prompt": json.dumps([USER]), "completions": json.dumps(["Good", "Bad"]), "pairs": "[[0, 1]]"},
    ],
)
def test_prompts_and_answers(row):
    (example,) = read([row])
    assert (example.prompt, example.completions, example.pairs) == ((USER,), (GOOD, BAD), ((0, 1),))


def test_texts_that_only_look_alike_stay_texts():
    """Lists of other things, one message inside of a text, a broken list, objects that are no message."""
    texts = [
        "[1, 2]",
        '["user", "Hi"]',
        '[{"name": "a"}]',
        f"{json.dumps([USER])} is it",
        '[{"role": "user"',
        "[]",
        "{}",
    ]
    for text in texts:
        assert messages_in(text) is None
        (example,) = read([{"prompt": text, "chosen": text, "rejected": "b"}])
        assert (example.prompt, example.completions) == (text, (text, "b"))


def test_one_kind_in_all_rows():
    """Neither a text among conversations nor a conversation among texts is read as the other."""
    text = {"prompt": "p", "chosen": "a", "rejected": "b"}
    kept = {"prompt": "p", "chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])}
    kept |= {"prompt": USER["content"]}
    with pytest.raises(ValueError, match=r"(chosen|rejected) holds messages, kept as JSON text; in the source's first"):
        read([text, kept])
    with pytest.raises(ValueError, match=r"chosen is a text without messages; in the source's first row it holds"):
        read([kept, text])
    with pytest.raises(ValueError, match=r"prompt holds messages, kept as JSON text"):
        read([text, text | {"prompt": json.dumps([USER])}])
    answer = json.dumps([USER])  # the question was for such a list: it does not end with an answer
    assert [example.completions for example in read([text, text | {"chosen": answer}])] == [("a", "b"), (answer, "b")]


def test_texts_and_messages_are_one_kind_too():
    text = {"prompt": "p", "chosen": "a", "rejected": "b"}
    chat = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    with pytest.raises(ValueError, match=r"the prompt is messages, that of the source's first row a text; valid: one"):
        read([text, chat])
    with pytest.raises(ValueError, match=r"the prompt is a text, that of the source's first row messages; valid: one"):
        read([chat, text])


@pytest.mark.parametrize(("text", "kind", "value"), [
    ("[1, 2]", list, [1, 2]),
    (" {'a': None}\n", dict, {"a": None}),
    ("[1, 2]", dict, "[1, 2]"),
    ("[1, 2", list, "[1, 2"),
    (r"['\d']", list, [r"\d"]),
    ("[" * 10_000, list, "[" * 10_000),
    (3, list, 3),
])  # fmt: skip
def test_decoded(text, kind, value):
    assert decoded(text, kind) == value


BROKEN = [
    str([GOOD | {"name": float("nan")}]),  # as pandas writes a missing value
    str([GOOD | {"tool_calls": np.array([{"id": "1"}], dtype=object)}]),  # as pandas writes lists that it read
    json.dumps(json.dumps([GOOD])),
    json.dumps([GOOD])[:-5],
    json.dumps({"messages": [GOOD]}),
    json.dumps([{"role": "assistant", "text": "Good"}]),
]


@pytest.mark.parametrize("text", BROKEN)
def test_answers_that_are_broken_messages_are_no_texts(text):
    row = {"prompt": "Hi", "chosen": text, "rejected": text.replace("Good", "Bad")}
    with pytest.raises(UserError, match=r"chosen looks like messages kept as text, but cannot be read"):
        read([row])


def test_one_answer_about_messages_stays_a_text():
    """A question for an example of messages, which only one of the answers gives."""
    (example,) = read([{"prompt": "Show me a chat", "chosen": json.dumps({"messages": [GOOD]}), "rejected": "No."}])
    assert example.completions == (json.dumps({"messages": [GOOD]}), "No.")


@pytest.mark.parametrize(
    "row",
    [
        {"completion": json.dumps([GOOD])},
        {"response_a": json.dumps([GOOD]), "response_b": json.dumps([BAD]), "winner": "a"},
        {"responses": [json.dumps([GOOD]), json.dumps([BAD])], "ratings": [2, 1]},
    ],
    ids=["a demonstration", "judged", "rated"],
)
def test_answers_of_every_format(row):
    (example,) = read([{"prompt": json.dumps([USER])} | row])
    assert (example.prompt, example.completions[0]) == ((USER,), GOOD)
