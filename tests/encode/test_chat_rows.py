"""Rows that become conversations: system columns, `as_chat`, the chat template's arguments. The right ids are those of
plain transformers: `apply_chat_template` on the messages, told by hand.
"""

import json

import pytest

from dpo.base.errors import InvalidValue, UserError
from dpo.config import SourceConfig
from dpo.pairs.prepare import prepare_data
from dpo.sources.formats.decision import decide_reading
from dpo.sources.formats.example import PROMPTS_DIFFER
from dpo.sources.formats.reading import read_row
from tests.support.data_fixtures import TinyModelConfig, all_pairs, make_config, make_tokenizer, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
SYSTEM, USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("system", "Be"), ("user", "Hi"), ("assistant", "Good"), ("assistant", "Bad"))
)
TEXTS = {"prompt": "Hi", "chosen": "Good", "rejected": "Bad"}
DIALOGUE = {side: f"\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: {side}" for side in ("chosen", "rejected")}
TURNS = tuple({"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c")))


def reading_of(row, **config):
    return decide_reading(SourceConfig("x.jsonl", **config), set(row), row, False, "data.train[0]")


def read(row, **config):
    return read_row(reading_of(row, **config), row)


def plain_pair(messages, chosen, rejected):
    """(prompt, winner, loser) as ids, of the texts that `apply_chat_template` writes."""
    tokenizer = make_tokenizer()
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    fulls = [tokenizer.apply_chat_template([*messages, answer], tokenize=False) for answer in (chosen, rejected)]
    assert all(full.startswith(prompt) for full in fulls)
    return tuple(tokenizer(text)["input_ids"] for text in (prompt, *(full[len(prompt) :] for full in fulls)))


@pytest.mark.usefixtures("hf_cache")
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"messages": [USER], "chosen": "Good", "rejected": [BAD]},
        {"question": [USER], "chosen": "Good", "rejected": "Bad"},
        {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
        {"prompt": repr([USER]), "chosen": repr([GOOD]), "rejected": repr([BAD])},
        {"conversations": json.dumps([{"from": "human", "value": "Hi"}]), "chosen": "Good", "rejected": "Bad"},
        {"prompt": [USER | {"content": [{"type": "text", "text": "Hi"}]}], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [USER | {"name": None}], "completions": ["Good", "Bad"], "ranking": [1, 2]},
    ],
    ids=lambda row: " ".join(row),
)
def test_a_row_gives_the_ids_of_plain_transformers(tmp_path, tokenizer_folder, row):
    path = write_jsonl(tmp_path / "a.jsonl", [row] * 2)
    data = prepare_data(make_config(path, tokenizer=tokenizer_folder), TinyModelConfig())
    assert all_pairs(data.train) == [plain_pair([USER], GOOD, BAD)] * 2


# --- a system column ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hf_cache")
@pytest.mark.parametrize(
    "row",
    [
        TEXTS,
        {"question": "Hi", "chosen": "Good", "rejected": "Bad"},
        {"instruction": "Hi", "chosen": "Good", "rejected": "Bad"},
        {"prompt": "Hi", "completions": ["Good", "Bad"], "scores": [1, 0]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": GOOD, "rejected": BAD},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Good", "rejected": "\n\nHuman: Hi\n\nAssistant: Bad"},
    ],
    ids=lambda row: " ".join(row),
)
def test_a_system_column_is_the_first_message(tmp_path, tokenizer_folder, row):
    """In every format; rows whose `system` is empty have none, but are conversations like the others."""
    rows = [row | {"system": text} for text in ("Be", "", None)] + [row]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = prepare_data(make_config(path, tokenizer=tokenizer_folder), TinyModelConfig())
    with_system, without = plain_pair([SYSTEM, USER], GOOD, BAD), plain_pair([USER], GOOD, BAD)
    assert all_pairs(data.train) == [with_system, without, without, without]


def test_the_same_system_message_is_written_once():
    row = {"system": "Be", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    assert read(row).prompt == (SYSTEM, USER)
    with pytest.raises(ValueError, match=r"system is 'Do', the conversation's own system message 'Be'; valid: one"):
        read(row | {"system": "Do"})
    assert read(row | {"system": "Do"}, columns={"unused": "system"}).prompt == (SYSTEM, USER)


def test_other_names_of_system():
    assert read(TEXTS | {"system_prompt": "Be"}).prompt == (SYSTEM, USER)
    assert read(TEXTS | {"persona": "Be"}, columns={"system": "persona"}).prompt == (SYSTEM, USER)


@pytest.mark.usefixtures("hf_cache")
@pytest.mark.parametrize(
    ("row", "config", "reason"),
    [
        (TEXTS | {"system": "Be"}, {}, "rows have system"),
        (TEXTS | {"tools": [{"name": "f"}]}, {}, "rows have tools"),
        (
            TEXTS | {"chat_template_kwargs": {"a": 1}, "system_prompt": "Be"},
            {},
            "rows have system_prompt and chat_templ",
        ),
        (TEXTS, {"as_chat": True}, "as_chat is true"),
        (TEXTS, {"template_args": {"a": 1}}, "template_args are given"),
    ],
)
def test_texts_that_become_conversations_need_a_template(tmp_path, row, config, reason):
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "plain")
    source = SourceConfig(write_jsonl(tmp_path / "a.jsonl", [row]), **config)
    assert (
        reason in reading_of(row, **config).line
        and "texts read as conversations, since" in reading_of(row, **config).line
    )
    with pytest.raises(UserError, match=rf"^data.train\[0\]: .*a.jsonl: texts are read as .* since {reason}"):
        prepare_data(make_config(source, tokenizer=str(tmp_path / "plain")), TinyModelConfig())


# --- as_chat --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        (TEXTS, (USER,), ("Good", "Bad")),
        # the space that joins an answer to its prompt is left out, an indentation is not
        (TEXTS | {"chosen": " Good", "rejected": "  Bad"}, (USER,), ("Good", "  Bad")),
        (TEXTS | {"chosen": "Good ", "rejected": "\n Bad"}, (USER,), ("Good ", "\n Bad")),
        ({"prompt": "Hi", "completions": ["a", "b"], "ranking": [1, 2]}, (USER,), ("a", "b")),
        (DIALOGUE, TURNS, ("chosen", "rejected")),
        # the same dialogue with the prompt apart, as in sets made of HH
        ({"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": " a", "rejected": " b"},
         TURNS, ("a", "b")),
        ({"prompt": "Q: a\n\nAssistant:", "chosen": " a", "rejected": " b"},
         ({"role": "user", "content": "Q: a\n\nAssistant:"},), ("a", "b")),
        ({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, (USER,), ("a", "b")),
        ({"info": {"subreddit": "s", "title": "t", "post": "p"}, "summaries": [{"text": " a"}, {"text": "b"}],
          "choice": 0},
         ({"role": "user", "content": "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"},), ("a", "b")),
    ],
)  # fmt: skip
def test_texts_as_chat(row, prompt, answers):
    example = read(row, as_chat=True)
    assert example.prompt == prompt
    assert example.completions == tuple({"role": "assistant", "content": text} for text in answers)
    assert example.pairs == ((0, 1),)


def test_as_chat_leaves_messages_as_they_are():
    """Also among texts; a pair whose prompts differ is dropped as ever."""
    messages = {"prompt": [USER], "chosen": [GOOD | {"content": " Good"}], "rejected": [BAD]}
    assert read(messages, as_chat=True).completions == (GOOD | {"content": " Good"}, BAD)
    reading = reading_of(TEXTS, as_chat=True)
    assert read_row(reading, messages).prompt == read_row(reading, TEXTS).prompt == (USER,)
    assert read(DIALOGUE | {"rejected": "\n\nHuman: x\n\nAssistant: b"}, as_chat=True) == PROMPTS_DIFFER


def test_a_dialogue_has_nothing_before_its_first_turn():
    with pytest.raises(ValueError, match=r"the dialogue begins with 'Once'"):
        read({side: f"Once{text}" for side, text in DIALOGUE.items()}, as_chat=True)


# --- arguments of the chat template -----------------------------------------------------------------------------------

CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("columns", "of_source", "args"),
    [
        ({}, {}, {}),
        ({}, {"enable_thinking": False}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": False, "x": 1},
         {"enable_thinking": True, "x": 1}),
        ({"chat_template_kwargs": '{"enable_thinking": true}'}, {}, {"enable_thinking": True}),
        ({"chat_template_kwargs": None}, {"x": 1}, {"x": 1}),
        ({"tools": [TOOL]}, {"tools": [], "x": 1}, {"tools": [TOOL], "x": 1}),
        ({"tools": '[{"name": "f"}]'}, {}, {"tools": [{"name": "f"}]}),
        ({"tools": ['{"name": "f"}']}, {}, {"tools": [{"name": "f"}]}),
        ({"tools": [], "chat_template_kwargs": {}}, {}, {}),
        ({"tools": ""}, {"tools": [TOOL]}, {"tools": [TOOL]}),
    ],
)  # fmt: skip
def test_arguments_of_a_row_are_over_those_of_the_source(columns, of_source, args):
    assert read(CHAT | columns, template_args=of_source).template_args == args


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize is given by the trainer"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is a list ([1]); valid: an object"),
        ({"tools": "search, browse"}, "tools is a text ('search, browse'); valid: a list"),
        ({"tools": ["search"]}, "tools[0] is a text ('search'); valid: an object"),
    ],
)
def test_wrong_arguments(columns, error):
    with pytest.raises(ValueError) as failure:
        read(CHAT | columns)
    assert str(failure.value).startswith(error)


def test_wrong_arguments_of_a_source():
    with pytest.raises(UserError, match=r"x.jsonl: data.train\[0\].template_args.add_generation_prompt is given by"):
        reading_of(CHAT, template_args={"add_generation_prompt": False})


@pytest.mark.usefixtures("hf_cache")
def test_the_order_of_the_keys_of_a_tool_counts(tmp_path):
    """A template writes a tool as JSON, its keys as they come: another order gives other ids, also beside a cache."""
    folder = str(tmp_path / "tokenizer")
    tokenizer = make_tokenizer(
        chat_template="{{ tools | tojson }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    path = write_jsonl(tmp_path / "a.jsonl", [CHAT])
    for tool in ({"name": "f", "type": "x"}, {"type": "x", "name": "f"}):
        config = make_config(SourceConfig(path, template_args={"tools": [tool]}), tokenizer=folder)
        ((prompt, *_),) = all_pairs(prepare_data(config, TinyModelConfig()).train)
        text = tokenizer.apply_chat_template(CHAT["prompt"], tools=[tool], tokenize=False)
        assert prompt == tokenizer(text)["input_ids"]


# --- prompts that end with the assistant ------------------------------------------------------------------------------


def test_a_prompt_may_end_with_the_words_of_the_assistant():
    begun = {"role": "assistant", "content": "Well,"}
    assert read({"prompt": [USER, begun], "chosen": " a", "rejected": " b"}).prompt == (USER, begun)


@pytest.mark.parametrize("answer", [GOOD, BAD])
def test_a_prompt_may_not_end_with_an_answer_itself(answer):
    """A column of whole conversations beside the answers: the model would learn to go on after its answer."""
    with pytest.raises(ValueError, match="the prompt ends with an answer of the row itself"):
        read({"messages": [USER, answer], "chosen": "Good", "rejected": "Bad"})


# --- the line of the report -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (TEXTS, "format preference, by its columns chosen, prompt, rejected: texts"),
        (CHAT, "format preference, by its columns chosen, prompt, rejected: conversations"),
        ({"system": "Be", "question": "Hi", "chosen": "a", "rejected": "b"},
         "format preference, by its columns chosen, question, rejected: texts read as conversations, since rows have "
         "system; prompt from question; system is the first message"),
        ({"instruction": "Hi", "input": "x", "chosen": "a", "rejected": "b"},
         "format preference, by its columns chosen, instruction, rejected: texts; prompt from instruction and input"),
        ({"conversations": [USER], "chosen": GOOD, "rejected": BAD, "tools": "[]"},
         "format sharegpt, by its columns chosen, conversations, rejected: conversations; the chat template gets "
         "tools"),
        ({"prompt": "[{'role': 'user', 'content': 'Hi'}]", "chosen": "a", "rejected": "b"},
         "format preference, by its columns chosen, prompt, rejected: conversations; prompt read from JSON text"),
    ],
)  # fmt: skip
def test_the_line_says_how_rows_are_read(row, line):
    assert reading_of(row).line == line


def test_the_line_of_a_format_that_is_given():
    assert reading_of(TEXTS, format="preference").line == "format preference: texts"


@pytest.mark.parametrize(
    ("row", "source", "unread"),
    [
        ({}, {"template_args": {"enable_thinkin": False}}, "enable_thinkin"),
        ({}, {"template_args": {"chat_template": "x", "style": "a"}}, "chat_template"),
        ({"tools": [{"name": "f"}]}, {}, "tools"),
    ],
)
def test_an_argument_that_the_template_does_not_read_is_refused(hf_cache, tmp_path, row, source, unread):
    """It would change nothing, and nobody would know."""
    template = "{% if style == 'a' %}!{% endif %}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    make_tokenizer(chat_template=template).save_pretrained(tmp_path / "t")
    path = write_jsonl(tmp_path / "a.jsonl", [TEXTS | row])
    config = make_config(SourceConfig(path, **source), tokenizer=str(tmp_path / "t"))
    with pytest.raises(UserError, match=rf"chat template does not read {unread}; valid: .*\(style\)"):
        prepare_data(config, TinyModelConfig())


@pytest.mark.parametrize("empty", [None, "", "null", json.dumps([]), json.dumps({})])
def test_an_empty_value_among_arguments_that_are_kept_as_text(empty):
    """As `json.dumps` writes None, [] and {} in the cells of a table."""
    reading = reading_of(TEXTS | {"tools": "[{}]", "chat_template_kwargs": "{}", "system": ""}, template_args={"a": 1})
    row = TEXTS | {"tools": empty, "chat_template_kwargs": empty}
    assert read_row(reading, row).template_args == {"a": 1}


def test_tool_calls_that_are_kept_as_text():
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"q": 1}}}]
    asked = {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)}
    row = {"prompt": [USER, asked, {"role": "tool", "content": "1"}], "chosen": [GOOD], "rejected": [BAD]}
    assert read(row).prompt[1]["tool_calls"] == calls


def test_the_place_of_a_conversation_that_does_not_end_with_an_answer():
    whole = {"chosen": [USER, GOOD, USER], "rejected": [USER, BAD, USER]}
    with pytest.raises(InvalidValue, match=r"chosen\[2\] has the role 'user'"):
        read({**whole})


def test_a_prompt_beside_whole_conversations_is_in_them_in_every_row():
    """The first row's prompt is blank, or its answers are single messages; a later one would be left out in silence."""
    whole = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    for first in (
        {"prompt": "Hi"} | whole,
        {"prompt": " "} | whole,
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
    ):
        reading = decide_reading(SourceConfig("x.jsonl"), set(first), first, False, "data.train[0]")
        assert read_row(reading, {"prompt": "  Hi\n"} | whole).prompt == (USER,)
        with pytest.raises(ValueError, match="prompt does not occur in chosen and rejected, which are whole"):
            read_row(reading, {"prompt": "Be brief"} | whole)
