"""Every format against examples written by hand, and what is refused, with its words."""

import json
import re
from typing import get_args, get_type_hints

import pytest

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.sources.formats.example import Example
from dpo.sources.formats.examples import FORMATS, check_columns, detect_format, holds_ids, to_example
from tests.support.data_fixtures import FIXTURES

USER, OTHER = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Yo"}
SYSTEM = {"role": "system", "content": "Be"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Good", "Bad"))


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


@pytest.mark.parametrize(
    ("format", "row", "example"),
    [
        (
            "tokens",
            {"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]},
            Example((1, 5), ((6, 2), (7, 2)), ((0, 1),)),
        ),
        (
            "tokens",
            {"prompt_ids": [1], "completion_ids": [[6], [7], [8]], "pairs": [[2, 0], [1, 0]]},
            Example((1,), ((6,), (7,), (8,)), ((2, 0), (1, 0))),
        ),
        (
            "tokens",
            {"prompt_ids": [1], "completion_ids": [[6], [7]], "ranking": [2, 1]},
            Example((1,), ((6,), (7,)), ((1, 0),)),
        ),
        # repeats and contradictions are kept, each is one pair
        (
            "grouped",
            {"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 1], [0, 1], [1, 0]]},
            Example("p", ("a", "b"), ((0, 1), (0, 1), (1, 0))),
        ),
        # 2 > 1 = 1: of three twos (0, 1), (0, 2), (1, 2) the last is a tie
        (
            "grouped",
            {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 2.0, 1]},
            Example("p", ("a", "b", "c"), ((1, 0), (1, 2)), ("tie",)),
        ),
        (
            "grouped",
            {"prompt": "p", "completions": ["a", "b", "c"], "ranking": [3, 1, 2], "scores": None},
            Example("p", ("a", "b", "c"), ((1, 0), (2, 0), (1, 2))),
        ),
        # a completion of a chat: text, a message, a list of one message
        (
            "grouped",
            {"prompt": [SYSTEM, USER], "completions": ["Good", BAD, [GOOD]], "pairs": [[0, 1]]},
            Example((SYSTEM, USER), (GOOD, BAD, GOOD), ((0, 1),)),
        ),
        (
            "sharegpt",
            {
                "conversations": [{"from": "system", "value": "Be"}, {"from": "human", "value": "Hi"}],
                "chosen": gpt("Good"),
                "rejected": {"from": "chatgpt", "value": "Bad"},
            },
            Example((SYSTEM, USER), (GOOD, BAD), ((0, 1),)),
        ),
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            Example("p", ("a", "b"), ((0, 1),)),
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            Example((USER,), (GOOD, BAD), ((0, 1),)),
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": "Good", "rejected": BAD | {"name": "Al"}},
            Example((USER,), (GOOD, BAD | {"name": "Al"}), ((0, 1),)),
        ),
        # whole conversations, without a prompt, and beside one as text or as messages
        (
            "preference",
            {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            Example((SYSTEM, USER), (GOOD, BAD), ((0, 1),)),
        ),
        (
            "preference",
            {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            Example((USER,), (GOOD, BAD), ((0, 1),)),
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            Example((USER,), (GOOD, BAD), ((0, 1),)),
        ),
        (
            "preference",
            {"chosen": [USER, GOOD], "rejected": [OTHER, BAD]},
            Example("", (), (), ("prompts_differ",)),
        ),
        # the prompt ends after the last answer's mark
        (
            "hh",
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
             "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"},
            Example("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", (" d", ""), ((0, 1),)),
        ),
        (
            "hh",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"},
            Example("", (), (), ("prompts_differ",)),
        ),
    ],
)  # fmt: skip
def test_example_of_row(format, row, example):
    assert to_example(format, row) == example


def fixture_rows(name):
    return [json.loads(line) for line in (FIXTURES / name).read_text().splitlines()]


def test_shp():
    """labels 1 means that A is preferred, 0 B (the card of stanfordnlp/SHP)."""
    examples = [to_example("shp", row) for row in fixture_rows("shp.jsonl")]
    assert [example.pairs for example in examples] == [((0, 1),), ((1, 0),), ((0, 1),)]
    assert examples[2].prompt == "\n\nHuman: My tap drips.\nWhat now?\n\nAssistant:"
    assert examples[2].completions == (" Change the washer first.", " Call somebody.")


def test_tldr():
    examples = [to_example("tldr", row) for row in fixture_rows("tldr.jsonl")]
    assert [example.pairs for example in examples] == [((0, 1),), ((1, 0),), ((0, 1),)]
    assert examples[1].prompt == (
        "SUBREDDIT: r/advice\n\nTITLE: Late friend\n\nPOST: My friend is always an hour late.\n\nTL;DR:"
    )
    assert examples[1].completions == (" A friend.", " My friend is always late, what can I do?")


GROUPED = {"prompt": "p", "completions": ["a", "b"]}
TLDR = {"info": {"subreddit": "s", "title": "t", "post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}


@pytest.mark.parametrize(
    ("format", "row", "what"),
    [
        ("preference", {"prompt": "p", "chosen": "a"}, "missing or null field rejected; the row has: prompt, chosen"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": None}, "missing or null field rejected"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": 3}, "rejected is a number (3); valid: a text"),
        ("preference", {"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt is a number (3); valid: a text or"),
        ("preference", {"chosen": [GOOD], "rejected": [BAD]}, "chosen has one message"),
        ("preference", {"prompt": [], "chosen": "a", "rejected": "b"}, "prompt is an empty list"),
        ("preference", {"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "chosen[0] has the role 'user'"),
        ("preference", {"prompt": [OTHER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "do not begin with"),
        ("preference", {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "null field prompt[0].content"),
        ("preference", {"prompt": [USER, "x"], "chosen": "a", "rejected": "b"}, "prompt[1] is a text ('x'); valid:"),
        ("hh", {"chosen": "Assistant: b", "rejected": "\n\nAssistant: c"}, "chosen has no '\\n\\nAssistant:'"),
        ("hh", {"chosen": [USER, GOOD], "rejected": "x"}, "chosen is a list; valid: a text"),
        ("sharegpt", {"conversations": [gpt("x")], "chosen": gpt("a"), "rejected": {"from": "human", "value": "b"}},
         "rejected has the role 'user'; valid: assistant"),
        ("sharegpt", {"conversations": [{"from": "narrator", "value": ""}], "chosen": gpt("a"), "rejected": gpt("b")},
         "conversations[0].from is 'narrator'; valid: human, user, gpt"),
        ("grouped", GROUPED, "nothing given; valid: exactly one of pairs, scores, ranking"),
        ("grouped", GROUPED | {"pairs": [[0, 1]], "scores": [1, 2]}, "pairs and scores given; valid: exactly one"),
        ("grouped", GROUPED | {"pairs": [[0, 2]]}, "pairs[0]: index 2 is out of range; valid: 0 to 1"),
        ("grouped", GROUPED | {"pairs": [[0, 1], [0, -1]]}, "pairs[1]: index -1 is out of range; valid: 0 to 1"),
        ("grouped", GROUPED | {"pairs": [[1, 1]]}, "pairs[0]: winner and loser are both 1"),
        ("grouped", GROUPED | {"pairs": [[0, 1, 0]]}, "pairs[0] is a list ([0, 1, 0]); valid: [winner, loser]"),
        ("grouped", GROUPED | {"pairs": [[0, True]]}, "pairs[0] is a list ([0, True]); valid: [winner, loser]"),
        ("grouped", GROUPED | {"scores": [1]}, "scores has 1 items for 2 completions"),
        ("grouped", GROUPED | {"scores": [1, "2"]}, "scores[1] is a text ('2'); valid: a finite number"),
        ("grouped", GROUPED | {"scores": [1, float("inf")]}, "scores[1] is a number (inf); valid: a finite number"),
        ("grouped", GROUPED | {"scores": [1, 10**400]}, "scores[1] is a number; valid: a finite number"),
        ("grouped", GROUPED | {"scores": [1, True]}, "scores[1] is a truth value (True); valid: a finite number"),
        ("grouped", GROUPED | {"ranking": [0, 1]}, "ranking[0] is a number (0); valid: a whole number from 1"),
        ("grouped", GROUPED | {"ranking": [1.5, 1]}, "ranking[0] is a number (1.5); valid: a whole number from 1"),
        ("grouped", {"prompt": "p", "completions": ["a", GOOD], "pairs": [[0, 1]]}, "completions[1] is an object"),
        ("tokens", {"prompt_ids": [1, "2"], "chosen_ids": [1], "rejected_ids": [2]}, "prompt_ids[1] is a text ('2')"),
        ("tokens", {"prompt_ids": [1], "chosen_ids": [1.0], "rejected_ids": [2]}, "chosen_ids[0] is a number (1.0)"),
        ("tokens", {"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [2], "completion_ids": []}, "one of the two"),
        ("shp", {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "labels is a number (2); valid"),
        ("tldr", TLDR | {"choice": True}, "choice is a truth value (True); valid: 0 or 1"),
        ("tldr", TLDR | {"info": {"subreddit": "s", "title": "t", "post": None}}, "missing or null field info.post"),
        ("tldr", TLDR | {"summaries": [{"text": "a"}]}, "summaries has 1 items; valid: 2"),
        ("tldr", TLDR | {"summaries": [{"text": "a"}, {"note": "b"}]}, "missing or null field summaries[1].text"),
    ],
)  # fmt: skip
def test_broken_row(format, row, what):
    with pytest.raises(ValueError) as error:
        to_example(format, row)
    assert what in str(error.value)
    assert not isinstance(error.value, UserError), "file and line are the caller's to add"


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ("prompt chosen rejected prompt_ids chosen_ids rejected_ids", "tokens"),
        ("prompt_ids completion_ids scores", "tokens"),
        ("prompt completions pairs chosen rejected", "grouped"),
        ("prompt completions ranking", "grouped"),
        ("conversations chosen rejected", "sharegpt"),
        ("prompt chosen rejected messages score_chosen", "preference"),
        ("chosen rejected", "hh"),
        ("history human_ref_A human_ref_B labels", "shp"),
        ("info summaries choice worker", "tldr"),
    ],
)
def test_detect_format(columns, format):
    row = dict.fromkeys(("chosen", "rejected"), "\n\nHuman: a\n\nAssistant: b")
    assert detect_format(set(columns.split()), row, "here") == format


def test_conversations_without_a_prompt_are_preference_not_hh():
    assert detect_format({"chosen", "rejected"}, {"chosen": [USER, GOOD]}, "here") == "preference"


def test_texts_without_the_mark_are_not_hh():
    """`hh` fits a source whose first row has the mark on both sides."""
    for row in ({"chosen": "a", "rejected": "b"}, {"chosen": "a\n\nAssistant: b", "rejected": "c"}):
        with pytest.raises(
            UserError, match=r"no format fits the columns chosen, rejected; .* which lacks prompt; valid"
        ):
            detect_format({"chosen", "rejected"}, row, "here")


@pytest.mark.parametrize(
    ("columns", "nearest", "lacks"),
    [
        ("ask good bad", "preference {prompt, chosen, rejected}", "chosen, prompt and rejected"),
        ("prompt answer", "preference {prompt, chosen, rejected}", "chosen and rejected"),
        ("chosen worse", "preference {prompt, chosen, rejected}", "rejected"),
        ("prompt completions mark", "grouped {prompt, completions, pairs|scores|ranking}", "pairs"),
        ("prompt_ids chosen_ids", "tokens {prompt_ids, chosen_ids, rejected_ids}", "rejected_ids"),
        ("history human_ref_A human_ref_B", "shp {history, human_ref_A, human_ref_B, labels}", "labels"),
    ],
)
def test_no_format_names_the_columns_and_the_nearest(columns, nearest, lacks):
    with pytest.raises(UserError) as error:
        detect_format(set(columns.split()), {}, "data.train[0].format: x.jsonl")
    message, listed = str(error.value), ", ".join(sorted(columns.split()))
    assert message.startswith(f"data.train[0].format: x.jsonl: no format fits the columns {listed}; the nearest is")
    assert f"is {nearest}" in message and f"which lacks {lacks}; valid: columns: {{" in message and "\n" not in message
    assert all(name in message for name in FORMATS)


def test_columns_of_another_format():
    with pytest.raises(UserError, match=r"^here: the columns chosen, rejected are not those of shp; valid: {hist"):
        check_columns("shp", {"chosen", "rejected"}, "here")


def test_the_choices_of_the_config_are_the_formats():
    """In the order in which `auto` tries them, by the name under which each stands."""
    assert get_args(get_type_hints(SourceConfig)["format"]) == ("auto", *FORMATS)
    assert all(format.name == name for name, format in FORMATS.items())


@pytest.mark.parametrize("name", FORMATS)
def test_the_shape_names_the_columns_that_are_read(name):
    inside = "".join(re.findall(r"\{.*?\}", FORMATS[name].shape))
    assert set(re.findall(r"\w+", inside)) == FORMATS[name].reads


def test_only_tokens_hold_ids():
    """What `auto` will be is not known before the columns are read."""
    assert [name for name in ("auto", *FORMATS) if holds_ids(name)] == ["tokens", "tldr_tokens"]
