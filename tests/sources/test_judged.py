"""Rows of judged answers against examples written by hand, and what is refused, with its words."""

import json

import pytest

from dpo.base.errors import InvalidValue
from dpo.sources.formats.example import Example
from dpo.sources.formats.examples import FORMATS, detect_format, to_example
from dpo.sources.formats.numbers import number_of, whole_number

A, B, TIE = (((0, 1),), ()), (((1, 0),), ()), ((), ("tie",))
"""Of two answers the first is better, the second, none."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# --- a winner by its name -------------------------------------------------------------------------------------------


def texts(judgement, first="response_a", second="response_b", **columns):
    """A row of two texts and its judgement, and the example that is right."""
    row = {"prompt": "p", first: "one", second: "two"} | columns
    return row, Example("p", ("one", "two"), *judgement)


@pytest.mark.parametrize(
    ("names", "firsts", "seconds"),
    [
        (("response_a", "response_b"), ["a", "A", "response_a", "Response A", "0", 0], ["b", "response_b", 1]),
        (("response_0", "response_1"), [0, "0", 0.0, "response_0", "A"], [1, "1", "1.0", "b"]),
        (("response_1", "response_2"), [1, "1", "response_1"], [2, "2", "Response 2"]),
        (("response0", "response1"), [0, "response0"], [1, "response1"]),
        (("response1", "response2"), [1, 1.0, "a"], [2, "response2"]),
        (("answer_a", "answer_b"), ["answer_a", "model_a"], ["answer_b", "Model_B"]),
        (("completion_a", "completion_b"), ["completion_a", "model_a"], ["B", "model_b"]),
    ],
)
def test_a_winner_is_an_answer_by_name(names, firsts, seconds):
    ties = ["tie", "Tie", "both_bad", "tie (bothbad)", "tie (both bad)", "both bad", "draw"]
    for judgement, values in ((A, firsts), (B, seconds), (TIE, ties)):
        for value in values:
            row, example = texts(judgement, *names, winner=value)
            assert to_example("judged", row) == example, value


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (("response_a", "response_b"), 2),
        (("response_a", "response_b"), -1),
        (("response_a", "response_b"), "-1"),
        (("response_a", "response_b"), True),
        (("response_a", "response_b"), "c"),
        (("response_1", "response_2"), 0),
        (("response_0", "response_1"), 2),
        (("response_0", "response_1"), 0.5),
        (("response_0", "response_1"), "gpt-4"),
    ],
)
def test_another_winner_is_refused(names, value):
    """1 of (1, 2) is the first, of (0, 1) the second: a number is the end of a name, and no index."""
    row, _ = texts(A, *names, winner=value)
    with pytest.raises(InvalidValue, match=rf"^winner is .*; valid: {names[0][-1]}, {names[1][-1]}, {names[0]}, "):
        to_example("judged", row)


def test_the_answers_must_be_told():
    with pytest.raises(InvalidValue, match=r"^response_a, response_b and answer_a, answer_b given; valid: one of resp"):
        to_example("judged", texts(A, winner="a", answer_a="x", answer_b="y")[0])
    with pytest.raises(InvalidValue, match=r"^nothing given; valid: one of response_a, response_b; response_0, "):
        to_example("judged", {"prompt": "p", "response_a": "x", "winner": "a"})
    with pytest.raises(InvalidValue, match=r"^winner and better_response_id given; valid: one of winner; better"):
        to_example("judged", texts(A, winner="a", better_response_id=1)[0])
    with pytest.raises(InvalidValue, match=r"^response_b is a number \(3\); valid: a text$"):
        to_example("judged", {"prompt": "p", "response_a": "x", "response_b": 3, "winner": "a"})


def test_a_prompt_of_messages():
    row = {"prompt": [user("Hi")], "response_1": "one", "response_2": [assistant("two")], "winner": 2}
    assert to_example("judged", row) == Example((user("Hi"),), (assistant("one"), assistant("two")), *B)


def test_pku_saferlhf():
    """better_response_id is the index of the more helpful answer; a column of the card is passed over."""
    row, example = texts(B, "response_0", "response_1", better_response_id=1, safer_response_id=0)
    assert to_example("judged", row) == example


# --- votes, and turns in JSON texts ----------------------------------------------------------------------------------


def votes(a, b, tie):
    return {"winner_model_a": a, "winner_model_b": b, "winner_tie": tie}


def arena_row(prompt, answer_a, answer_b, *vote, pack=json.dumps):
    return {"prompt": pack(prompt), "response_a": pack(answer_a), "response_b": pack(answer_b)} | votes(*vote)


@pytest.mark.parametrize("pack", [json.dumps, list])
def test_turns(pack):
    """Turns as JSON texts, as Kaggle has them, or as lists. After equal answers the pair is that of the last turn."""
    row = arena_row(["Hi"], ["one"], ["two"], 0, 1, 0, pack=pack)
    assert to_example("judged", row) == Example((user("Hi"),), (assistant("two"), assistant("one")), ((0, 1),))
    row = arena_row(["Hi", "Go on"], ["Yo", "one"], ["Yo", "two"], 1, 0, 0, pack=pack)
    prompt = (user("Hi"), assistant("Yo"), user("Go on"))
    assert to_example("judged", row) == Example(prompt, (assistant("one"), assistant("two")), ((0, 1),))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (arena_row(["Hi", "Go on"], ["Yo", "one"], ["Hey", "two"], 1, 0, 0), "prompts_differ"),
        (arena_row(["Hi"], ["one"], ["two"], 0, 0, 1), "tie"),
        (arena_row(["Hi"], ["\ud83d"], ["two"], 1, 0, 0), "not_unicode"),
        (arena_row(["Hi \udc00"], ["one"], ["two"], 0, 1, 0), "not_unicode"),
    ],
)
def test_turns_without_a_pair(row, reason):
    """Half a surrogate pair, which the arena's JSON texts escape, is no character."""
    assert to_example("judged", row) == Example("", (), (), (reason,))


def test_an_answer_that_is_null_is_empty():
    """The arena has such answers; an empty answer is dropped and counted later, as any other."""
    row = arena_row(["Hi"], [None], ["two"], 0, 1, 0)
    assert to_example("judged", row) == Example((user("Hi"),), (assistant("two"), assistant("")), ((0, 1),))


@pytest.mark.parametrize("vote", [("1", "0", "0"), (1, 0, 0), (1.0, 0.0, 0.0)])
def test_votes_for_texts(vote):
    """A text in brackets is no list of turns. A table has votes as texts; two columns do without ties."""
    for prompt in ("p", "[INST] p [/INST]", "[1]", "[]"):
        row = {"prompt": prompt, "answer_a": '["x"]', "answer_b": "two"} | votes(*vote)
        assert to_example("judged", row) == Example(prompt, ('["x"]', "two"), *A)
    del row["winner_tie"]
    assert to_example("judged", row) == Example("[]", ('["x"]', "two"), *A)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (arena_row(["Hi"], ["one"], ["two"], 1, 1, 0), "1 in winner_model_a and winner_model_b of winner_model_a,"),
        (arena_row(["Hi"], ["one"], ["two"], 0, 0, 0), "1 in none of winner_model_a, winner_model_b, winner_tie;"),
        (arena_row(["Hi"], ["one"], ["two"], 2, 0, 0), "winner_model_a is a number (2); valid: 0 or 1"),
        (arena_row(["Hi", "Yo"], ["one", "x"], ["two"], 1, 0, 0), "response_b is a list of 1 turns; valid: a list of"),
        (arena_row(["Hi"], "one", ["two"], 1, 0, 0), "response_a is a text ('\"one\"'); valid: a list of 1 texts, as"),
        (arena_row(["Hi"], ["one"], ["two"], 1, 0, 0) | {"response_b": '["two"'}, "response_b is a text ('[\"two\"')"),
    ],
)  # fmt: skip
def test_broken_votes(row, what):
    with pytest.raises(InvalidValue) as error:
        to_example("judged", row)
    assert what in str(error.value)


# --- the arena's conversations ----------------------------------------------------------------------------------------


def test_arena():
    a, b, other = ([user(first), assistant(text)] for first, text in (("Hi", "one"), ("Hi", "two"), ("Yo", "two")))
    conversations = {"conversation_a": a, "conversation_b": b}
    best_a = Example((user("Hi"),), (assistant("one"), assistant("two")), ((0, 1),))
    best_b = Example((user("Hi"),), (assistant("two"), assistant("one")), ((0, 1),))
    assert to_example("arena", conversations | {"winner": "model_a"}) == best_a
    assert to_example("arena", conversations | {"winner": "model_b"}) == best_b
    assert to_example("arena", conversations | {"winner": "tie (bothbad)"}) == Example("", (), (), ("tie",))
    differ = conversations | {"conversation_b": other, "winner": "model_a"}
    assert to_example("arena", differ) == Example("", (), (), ("prompts_differ",))
    with pytest.raises(InvalidValue, match=r"^conversation_b is an empty list"):
        to_example("arena", conversations | {"conversation_b": [], "winner": "model_a"})


# --- HelpSteer3, Nectar, ratings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "judgement"), [(-3, A), (-1, A), ("-2", A), (0, TIE), ("0", TIE), (1, B), (3.0, B), ("3", B)]
)
def test_helpsteer(score, judgement):
    """Below 0 the card prefers response1, above it response2."""
    context = [user("Hi"), assistant("Yo"), user("Go on")]
    row = {"context": context, "response1": "one", "response2": "two", "overall_preference": score}
    expected = Example(tuple(context), (assistant("one"), assistant("two")), *judgement)
    assert to_example("helpsteer", row | {"domain": "code"}) == expected
    for wrong in (4, -4, 0.5, "much", True):
        with pytest.raises(InvalidValue, match=r"^overall_preference is .*; valid: -3 to 3$"):
            to_example("helpsteer", row | {"overall_preference": wrong})


def test_nectar():
    """Ranks 2, 1, 2: the second beats both others, which tie. Prompt and answer together are the text of the file."""
    answers = [{"answer": text, "rank": rank, "model": "m"} for text, rank in (("one", 2), ("two", 1.0), ("three", 2))]
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": answers, "turns": 1}
    prompt, completions = "\n\nHuman: Hi\n\nAssistant:", (" one", " two", " three")
    assert to_example("nectar", row) == Example(prompt, completions, ((1, 0), (1, 2)), ("tie",))
    with pytest.raises(InvalidValue, match=r"^missing or null field answers\[1\].rank"):
        to_example("nectar", row | {"answers": [answers[0], {"answer": "x"}]})
    with pytest.raises(InvalidValue, match=r"^prompt does not end"):
        to_example("nectar", row | {"prompt": "Hi"})


@pytest.mark.parametrize("name", ["completions", "responses", "generations"])
def test_rated(name):
    """4.5 > 4 = 4: of three twos one is a tie."""
    row = {"prompt": "p", name: ["one", "two", "three"], "ratings": [4, 4.5, "4"]}
    assert to_example("rated", row) == Example("p", ("one", "two", "three"), ((1, 0), (1, 2)), ("tie",))
    with pytest.raises(InvalidValue, match=r"^ratings\[1\] is null"):
        to_example("rated", row | {"ratings": [1, None, 2]})


# --- the token columns of the TL;DR reproduction ----------------------------------------------------------------------

PAD, END = 50277, 0


def labelled(side, prompt, answer, length=10):
    """The columns of a side as tldr_dataset.py writes them: padded at the end, the prompt's labels are padding."""
    padding = [PAD] * (length - len(prompt) - len(answer))
    ids, labels = [*prompt, *answer, *padding], [*[PAD] * len(prompt), *answer, *padding]
    return {f"query_{side}_token": ids, f"query_{side}_token_response_label": labels}


def test_tldr_tokens():
    """The second answer was cut: it fills the row and has no end."""
    row = labelled("chosen", [5, 6, 7], [8, END]) | labelled("rejected", [5, 6, 7], [9] * 7)
    assert to_example("tldr_tokens", row) == Example((5, 6, 7), ((8, END), (9,) * 7), ((0, 1),))
    differ = labelled("chosen", [5, 6, 7], [8, END]) | labelled("rejected", [5, 6], [9, END])
    assert to_example("tldr_tokens", differ) == Example("", (), (), ("prompts_differ",))
    for wrong in (row | {"query_chosen_token": [5, 6]}, row | {"query_chosen_token_response_label": [5] + [PAD] * 9}):
        with pytest.raises(InvalidValue, match=r"^query_chosen_token_response_label does not begin with padding"):
            to_example("tldr_tokens", wrong)


# --- numbers, detection -----------------------------------------------------------------------------------------------


def test_numbers_of_tables():
    for value, number in ((1, 1), ("1", 1), (" -2 ", -2), ("1.50", 1.5), ("2e3", 2000), (0.5, 0.5)):
        assert number_of(value, "n") == number
    for value in (True, None, "", "one", "nan", "inf", "1_0", "0x1", float("nan"), [1]):
        with pytest.raises(InvalidValue, match=r"^n is .*; valid: a finite number$"):
            number_of(value, "n")
    assert [whole_number(value, "n", range(2)) for value in ("1", 1.0, "0.0", 0)] == [1, 1, 0, 0]
    for value in (2, -1, 0.5, "1.5", True):
        with pytest.raises(InvalidValue, match=r"^n is .*; valid: 0 or 1$"):
            whole_number(value, "n", range(2))


def test_published_sets_in_a_table():
    """The label and the choice of SHP and TL;DR are texts in a CSV."""
    row = {"history": "h", "human_ref_A": "a", "human_ref_B": "b"}
    assert to_example("shp", row | {"labels": "0"}).pairs == ((1, 0),)
    assert to_example("shp", row | {"labels": "1"}).pairs == ((0, 1),)


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ("id model_a model_b prompt response_a response_b winner_model_a winner_model_b winner_tie", "judged"),
        ("prompt response_0 response_1 is_response_0_safe better_response_id safer_response_id", "judged"),
        ("prompt answer_a answer_b winner", "judged"),
        ("question_id model_a model_b winner judge conversation_a conversation_b turn language", "arena"),
        ("domain language context response1 response2 overall_preference individual_preference", "helpsteer"),
        ("prompt answers turns num_responses source good_natured", "nectar"),
        ("prompt generations ratings", "rated"),
        ("prompt completions scores ratings", "grouped"),
        ("prompt chosen rejected response_a response_b winner", "preference"),
        ("query_chosen_token query_chosen_token_response_label query_rejected_token "
         "query_rejected_token_response_label", "tldr_tokens"),
        ("info summaries choice query_chosen_token query_chosen_token_response_label query_rejected_token "
         "query_rejected_token_response_label", "tldr"),
    ],
)  # fmt: skip
def test_auto(columns, format):
    """The ids of TL;DR are of one tokenizer: where the texts are there too, they are read unless told otherwise."""
    assert detect_format(set(columns.split()), {"prompt": "\n\nHuman: a\n\nAssistant: "}, "here") == format
    assert FORMATS[format].has_columns(set(columns.split()))


def test_answers_without_a_dialogue_are_not_nectar():
    with pytest.raises(ValueError, match=r"no format fits the columns answers, prompt"):
        detect_format({"prompt", "answers"}, {"prompt": "p"}, "here")
