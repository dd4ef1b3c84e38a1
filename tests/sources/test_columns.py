"""The columns of a source: the source's own names, the prompt that they hold, and what is not read."""

import pytest

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.pairs.prepare import prepare_data
from dpo.sources.formats.decision import decide_reading
from dpo.sources.formats.reading import Reading, read_row
from tests.support.data_fixtures import TinyModelConfig, make_config, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
PAIR = {"chosen": "good", "rejected": "bad"}
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Good"), ("assistant", "Bad"))
)
SINGLE = {"chosen": [GOOD], "rejected": BAD}
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}


def decide(row, format="auto", **config) -> Reading:
    """The reading of a source whose rows have the columns of this one."""
    return decide_reading(SourceConfig("x.jsonl", format=format, **config), set(row), row, False, "data.train[0]")


def prompt_of(row, **config):
    return read_row(decide(row, **config), row).prompt


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "q"}, "q"),
        ({"instruction": "do"}, "do"),
        ({"instruction": "do", "input": "it"}, "do\nit"),  # as LLaMA-Factory joins them
        ({"instruction": "do", "input": ""}, "do"),
        ({"instruction": "do", "input": None}, "do"),
        ({"instruction": "", "input": "it"}, "it"),
        ({"prompt": "do q", "question": "q", "instruction": "do"}, "do q"),
        ({"question": "q", "messages": [USER]}, "q"),
    ],
)
def test_the_prompt_of_texts(row, prompt):
    assert prompt_of(row | PAIR) == prompt


@pytest.mark.parametrize(
    "messages", [[USER], [{"from": "human", "value": "Hi"}], '[{"role": "user", "content": "Hi"}]'], ids=str
)
def test_messages_are_the_prompt_of_single_answers(messages):
    example = read_row(decide({"messages": messages} | SINGLE), {"messages": messages} | SINGLE)
    assert (example.prompt, example.completions) == ((USER,), (GOOD, BAD))


@pytest.mark.parametrize("messages", [[USER], [USER, GOOD], [USER, BAD]], ids=["the prompt", "chosen", "rejected"])
def test_messages_beside_whole_conversations_repeat_them(messages):
    """As in UltraFeedback, whose `messages` are those of chosen; other ones are no prompt and no copy."""
    row = {"messages": messages} | WHOLE
    reading = decide(row)
    assert read_row(reading, row).prompt == (USER,)
    begin, end = (
        "format preference, by its columns chosen, messages, rejected: conversations; ",
        "without their last messages",
    )
    assert reading.line == f"{begin}prompt from chosen and rejected, {end}"
    with pytest.raises(ValueError, match=r"do not begin with prompt.*prompt is the column messages"):
        read_row(reading, WHOLE | {"messages": [{"role": "user", "content": "Else"}]})


def test_conversations_beside_whole_conversations_repeat_them():
    row = {"conversations": [USER]} | WHOLE
    assert read_row(decide(row), row).prompt == (USER,)
    with pytest.raises(ValueError, match="do not begin with prompt"):
        read_row(decide(row), row | {"conversations": [{"from": "human", "value": "Else"}]})


def test_other_formats_take_the_same_prompts():
    row = {"question": "q", "completions": ["a", "b"], "scores": [1, 2]}
    assert read_row(decide(row), row).prompt == "q"
    assert (
        decide(row).line == "format grouped, by its columns completions, question, scores: texts; prompt from question"
    )


def test_two_prompts_are_none():
    with pytest.raises(UserError, match=r"no format fits .* which lacks prompt; valid: columns: {prompt: NAME}"):
        decide({"question": "q", "instruction": "do"} | PAIR)
    named = {"prompt": "question", "unused": "instruction"}
    assert prompt_of({"question": "q", "instruction": "do"} | PAIR, columns=named) == "q"
    with pytest.raises(UserError, match=r"instruction: would not be read, but looks like part of the prompt"):
        decide({"question": "q", "instruction": "do"} | PAIR, columns={"prompt": "question"})


# --- `columns` of the config ------------------------------------------------------------------------------------------


def test_a_source_names_its_columns():
    """Also where it has another column of the known name."""
    row = {"ask": "q", "yes": "good", "no": "bad", "chosen": 3, "prompt": ""}
    reading = decide(row, columns={"prompt": "ask", "chosen": "yes", "rejected": "no"})
    example = read_row(reading, row)
    assert (example.prompt, example.completions) == ("q", ("good", "bad"))
    assert (
        reading.line
        == "format preference, by its columns ask, no, yes: texts; chosen from yes; prompt from ask; rejected from no"
    )
    assert reading.own_columns == {"ask", "yes", "no"}


def test_named_instruction_and_input():
    row = {"task": "do", "context": "it"} | PAIR
    assert prompt_of(row, columns={"instruction": "task", "input": "context"}) == "do\nit"


def test_weight_and_margin_are_read_where_they_are_named():
    row = {"prompt": "p", "w": 2, "margin": 1} | PAIR
    assert decide(row).own_columns == {"prompt", "chosen", "rejected"}
    assert decide(row, columns={"weight": "w", "margin": "margin"}).own_columns == {*row}


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"prompt": "ask"}, "columns.prompt: the source has no column 'ask', or it is empty in every row; valid: ch"),
        ({"ask": "q"}, "columns.ask: no format knows this name; valid: "),
        ({"prompt": "q", "system": "q"}, "columns: prompt and system name the same column 'q'"),
        ({"prompt": "q", "unused": "q"}, "columns: prompt and unused name the same column 'q'"),
        ({"unused": "context"}, "columns.unused: the source has no column 'context', or it is empty"),
        ({"prompt": "q", "scores": "s"}, "columns.scores: the format preference does not read scores here"),
    ],
)
def test_wrong_columns(columns, error):
    with pytest.raises(UserError) as failure:
        decide({"q": "p", "s": "t"} | PAIR, columns=columns)
    assert str(failure.value).startswith(f"data.train[0].{error}")


def test_errors_of_rows_name_the_own_columns():
    row = {"ask": "q", "answer": "a", "rejected": "b"}
    reading = decide(row, columns={"prompt": "ask", "chosen": "answer"})
    with pytest.raises(ValueError, match=r"^chosen is a number \(3\) \(chosen is the column answer\); valid: a text$"):
        read_row(reading, row | {"answer": 3})


# --- columns that are not read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["context", "history", "images", "documents", "input", "Context", "system_prompt"])
def test_no_part_of_the_prompt_is_left_out_in_silence(name):
    """An error names the column and both ways; named as unused, it is left out."""
    row = {"prompt": "p", "system": "s", name: "part"} | PAIR
    with pytest.raises(UserError) as error:
        decide(row)
    text = str(error.value)
    assert text.startswith(f"data.train[0].columns: x.jsonl: {name}: would not be read, but looks like part of the")
    assert f"columns: {{NAME: {name}}}" in text and f"columns: {{unused: '{name}'}}" in text
    assert name not in decide(row, columns={"unused": name}).own_columns


def test_several_columns_are_left_out():
    row = {"prompt": "p", "context": "c", "images": []} | PAIR
    assert prompt_of(row, columns={"unused": "context, images"}) == "p"
    row = {"prompt": "p", "context, images": "c"} | PAIR
    assert prompt_of(row, columns={"unused": "context, images"}) == "p"


def test_a_dialogue_beside_whole_conversations_is_a_copy():
    """Its messages are in chosen and rejected; a context need not be."""
    decide({"conversation": ["x"], "history": ["y"]} | WHOLE)
    with pytest.raises(UserError, match="context: would not be read"):
        decide({"context": "x"} | WHOLE)


def test_a_prompt_that_no_conversation_holds():
    """White space aside."""
    assert prompt_of({"prompt": " Hi\n"} | WHOLE) == (USER,)
    with pytest.raises(UserError, match=r"the first row's prompt does not occur; valid: columns: {unused: 'prompt'}"):
        decide({"prompt": "Translate"} | WHOLE)
    assert prompt_of({"prompt": "Translate"} | WHOLE, columns={"unused": "prompt"}) == (USER,)
    system = {"role": "system", "content": "Translate"}
    assert prompt_of({"prompt": "Translate"} | WHOLE, columns={"system": "prompt"}) == (system, USER)


def test_ids_are_the_whole_prompt():
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "system": "s", "context": "c"}
    assert decide(row).line == "format tokens, by its columns chosen_ids, prompt_ids, rejected_ids: token ids"
    for name, value in (("as_chat", True), ("template_args", {"a": 1})):
        with pytest.raises(UserError, match=rf"^data.train\[0\].{name}: x.jsonl has token ids"):
            decide(row, **{name: value})


@pytest.mark.usefixtures("hf_cache")
def test_a_few_of_many_columns_are_named(tmp_path, tokenizer_folder):
    """In the report, in the error that no format fits, and for one name that is itself long."""
    row = {"prompt": "p", **PAIR, **{f"note{i:04d}": i + 1 for i in range(5000)}, "x" * 5000: 1}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    lines = prepare_data(make_config(path, tokenizer=tokenizer_folder), TinyModelConfig()).report.lines()
    assert (
        "  columns not used: note0000, note0001, note0002, note0003, note0004, note0005, note0006, note0007, … (5,001)"
        in lines
    )
    for broken in (row | {"prompt": 3}, {key: value for key, value in row.items() if key != "prompt"}):
        path = write_jsonl(tmp_path / "b.jsonl", [broken])
        with pytest.raises(UserError) as error:
            prepare_data(make_config(path, tokenizer=tokenizer_folder), TinyModelConfig())
        assert len(str(error.value)) < 600


@pytest.mark.usefixtures("hf_cache")
def test_a_broken_first_row_is_named_by_its_line(tmp_path, tokenizer_folder):
    """Also where the prompt that it breaks is one of two columns."""
    row = {"instruction": [USER], "input": "it"} | PAIR
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=r"a\.jsonl:1: instruction is a list .*; valid: a text$"):
        prepare_data(make_config(path, tokenizer=tokenizer_folder), TinyModelConfig())


def test_a_first_row_without_a_pair_does_not_tell_texts_from_messages():
    """Two conversations of which neither is the other's: the rows after it are read as what they are."""
    other = {"role": "user", "content": "Yo"}
    differ = {"system": "Be", "chosen": [USER, GOOD], "rejected": [other, BAD]}
    reading = decide(differ)
    assert reading.is_text is None
    assert read_row(reading, WHOLE).prompt == (USER,)
