"""Messages reach the chat template whole: tool calls, parts, nulls of tables, ShareGPT's senders."""

import json

import datasets
import pytest

from dpo.config import SourceConfig
from dpo.sources.formats.decision import decide_reading
from dpo.sources.formats.reading import read_row
from dpo.sources.formats.row_fields import chat_message, messages_of
from dpo.sources.source import open_source
from tests.support.data_fixtures import make_tokenizer, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]

TOOL_TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content is defined %}({{ m.reasoning_content }}){% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}"
    "{% if m.name is defined %}<{{ m.name }}>{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"q": "wool", "in": None}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "look", "tool_call_id": "1", "content": "found"}
THOUGHT = {"role": "assistant", "content": "Good", "reasoning_content": "Hm"}
BAD = {"role": "assistant", "content": "Bad"}


def written(messages, **args) -> str:
    return str(make_tokenizer(chat_template=TOOL_TEMPLATE).apply_chat_template(messages, tokenize=False, **args))


@pytest.mark.parametrize(
    "messages",
    [
        [USER, CALLS, RESULT],
        [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT],
        [USER, CALLS | {"content": ""}, RESULT | {"content": ""}],
        [USER | {"name": "Al"}, THOUGHT, USER],
        [{"role": "developer", "content": "Be"}, USER | {"weight": 0}],
        [CALLS | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"q": 1}'}}]}],
    ],
)
def test_the_template_writes_what_it_writes_of_the_row(messages):
    assert written(messages_of(messages, "prompt")) == written(messages)
    assert messages_of(messages, "prompt") == tuple(messages)


def test_an_answer_of_tool_calls():
    row = {"prompt": [USER], "chosen": [CALLS], "rejected": [BAD]}
    reading = decide_reading(SourceConfig("x"), set(row), row, False, "data.train[0]")
    assert read_row(reading, row).completions == (CALLS, BAD)


def test_keys_that_are_null_are_missing():
    """Parquet gives every message the keys of all; an empty list of calls is none. The content stays."""
    nulls = {"name": None, "tool_calls": None, "reasoning_content": None}
    assert chat_message(USER | nulls, "m") == USER
    assert chat_message(USER | {"tool_calls": []}, "m") == USER
    assert chat_message(CALLS, "m") == CALLS


@pytest.mark.usefixtures("hf_cache")
def test_parquet_gives_the_messages_of_json(tmp_path):
    """At any depth: one call has the argument q, the other n, so that each has the other's as null."""
    calls = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {key: 1}}}]}
        for key in ("q", "n")
    ]
    rows = [
        {"chosen": [USER, call, RESULT, THOUGHT], "rejected": [USER, call, RESULT, BAD], "tools": [tool]}
        for call, tool in zip(calls, ({"name": "f", "is": 1}, {"name": "f", "of": 2}), strict=True)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    examples = []
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")):
        source = open_source(SourceConfig(path), "data.train[0]")
        reading = decide_reading(SourceConfig(path), source.columns, source.first_row(), not source.has_lines, "")
        records = source.rows if not source.has_lines else map(json.loads, source.rows["row"])
        examples.append([read_row(reading, row) for row in records])
    assert examples[0] == examples[1]
    for row, example in zip(rows, examples[0], strict=True):
        assert (example.prompt, example.completions) == (tuple(row["chosen"][:-1]), (THOUGHT, BAD))
        assert example.template_args == {"tools": row["tools"]}
        assert written(example.prompt, **example.template_args) == written(row["chosen"][:-1], tools=row["tools"])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}], "a"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}], "a b"),
        ([{"type": "text", "text": "a", "image": None}, {"text": "b"}], "ab"),
        ([], ""),
    ],
)
def test_parts_of_text_are_one_text(content, text):
    assert chat_message({"role": "user", "content": content}, "m") == {"role": "user", "content": text}
    assert chat_message({"from": "human", "value": content}, "m") == {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": [{"type": "image"}]}, "m.content[0] is a part of the type 'image'; valid: p"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}, "m.content[1] is a"),
        ({"role": "user", "content": ["a"]}, "m.content[0] is a text ('a'); valid: an object"),
        ({"role": "user", "content": [{"type": "text"}]}, "missing or null field m.content[0].text"),
        ({"role": "user", "content": None}, "missing or null field m.content"),
        ({"role": "assistant", "tool_calls": []}, "missing or null field m.content"),
        ({"role": 3, "content": "a"}, "m.role is a number (3); valid: a text"),
        ({"role": "user", "content": {"a": 1}}, "m.content is an object"),
        ({"from": "narrator", "value": "a"}, "m.from is 'narrator'; valid: human, user, gpt"),
        ({"from": "function_call", "value": "look it up"}, "m.value is no call of a function; valid: JSON: {name"),
    ],
)  # fmt: skip
def test_broken_messages(message, error):
    with pytest.raises(ValueError) as failure:
        chat_message(message, "m")
    assert str(failure.value).startswith(error)


def test_senders_of_sharegpt():
    """Those of LLaMA-Factory and of sets of function calls; keys beside `from` and `value` stay."""
    call = {"name": "look", "arguments": {"q": "wool"}}
    conversation = [
        {"from": "system", "value": "Be"},
        {"from": "human", "value": "Hi", "weight": 1},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "found"},
        {"from": "function_call", "value": json.dumps([call, call])},
        {"from": "tool", "value": "found"},
        {"from": "gpt", "value": "Good"},
    ]
    tool_call = {"type": "function", "function": call}
    assert messages_of(conversation, "conversations") == (
        {"role": "system", "content": "Be"},
        USER | {"weight": 1},
        {"role": "assistant", "content": "", "tool_calls": [tool_call]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "", "tool_calls": [tool_call, tool_call]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "Good"},
    )
