"""Preference files in the shapes that people have, each with the conversations and texts that it means.

A shape is rows, and for each row its meaning, written out by hand: messages of the prompt, the winner, the loser,
arguments of the chat template. `texts` say that rows stay texts. Sources of the shapes: the cards of the data sets, and
the documentation of TRL, axolotl and LLaMA-Factory.
"""

import json
from dataclasses import dataclass, field
from typing import Any

Chat = dict[str, Any]


def user(text: str) -> Chat:
    return {"role": "user", "content": text}


def assistant(text: str) -> Chat:
    return {"role": "assistant", "content": text}


def system(text: str) -> Chat:
    return {"role": "system", "content": text}


def human(text: str) -> Chat:
    return {"from": "human", "value": text}


def gpt(text: str) -> Chat:
    return {"from": "gpt", "value": text}


@dataclass(frozen=True)
class Meaning:
    """The preference of a row: a conversation, or texts."""

    prompt: list[Chat] | str
    winner: Chat | str
    loser: Chat | str
    template_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """Rows of a file and the meaning of each pair, in order; rows without a pair have none."""

    rows: list[dict[str, Any]]
    meanings: list[Meaning]
    source: dict[str, Any] = field(default_factory=dict)
    """Keys of the source in the config."""


WOOL, HONEY = "Which animal gives wool?", "What do bees make?"
SHEEP, TREES = "A sheep gives wool.", "Wool grows on trees."
MAKES, BUTTER = "Bees make honey.", "They make butter."
SAILOR, POET = "Answer like a sailor.", "Answer like a poet."


def _both(first: list[Chat] | None = None, second: list[Chat] | None = None, **args: Any) -> list[Meaning]:
    """The two questions as conversations, each with messages before it."""
    return [
        Meaning([*(first or []), user(WOOL)], assistant(SHEEP), assistant(TREES), args),
        Meaning([*(second or []), user(HONEY)], assistant(MAKES), assistant(BUTTER), args),
    ]


TEXTS = [Meaning(WOOL, SHEEP, TREES), Meaning(HONEY, MAKES, BUTTER)]
WITH_SYSTEM = _both([system(SAILOR)])


def _rows(question: str, chosen: str = "chosen", rejected: str = "rejected", **more: list[Any]) -> list[dict[str, Any]]:
    """The two questions under these names of columns; `more` has both rows' values of further columns."""
    rows = [{question: WOOL, chosen: SHEEP, rejected: TREES}, {question: HONEY, chosen: MAKES, rejected: BUTTER}]
    return [{name: values[i] for name, values in more.items()} | row for i, row in enumerate(rows)]


def _talks(*, before: tuple[list[Chat], list[Chat]] = ([], []), **more: list[Any]) -> list[dict[str, Any]]:
    """The two questions as whole conversations in chosen and rejected."""
    both = ((WOOL, SHEEP, TREES), (HONEY, MAKES, BUTTER))
    return [
        {name: values[i] for name, values in more.items()}
        | {
            "chosen": [*before[i], user(question), assistant(good)],
            "rejected": [*before[i], user(question), assistant(bad)],
        }
        for i, (question, good, bad) in enumerate(both)
    ]


def _as_text(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The rows with the values of some columns as JSON text."""
    return [{key: json.dumps(value) if key in names else value for key, value in row.items()} for row in rows]


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"q": "wool"}}}
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "Looks up.", "parameters": {"type": "object"}},
}
CALLED = [user(WOOL), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
TOLD = [*CALLED, {"role": "tool", "name": "look_up", "content": "sheep"}]
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "Which animal "}, {"type": "text", "text": "gives wool?"}],
}
ANSWERS = {"chosen": assistant(SHEEP), "rejected": assistant(TREES)}
QUIET = {"template_args": {"enable_thinking": False}}
ONE = Meaning([user(WOOL)], assistant(SHEEP), assistant(TREES))

SHAPES = {
    # a system column
    "orca": Shape(_rows("question", system=[SAILOR, ""]), WITH_SYSTEM),
    "orca_null_system": Shape(_rows("question", system=[SAILOR, None]), WITH_SYSTEM),
    "orca_no_system": Shape(_rows("question", system=["", ""]), TEXTS),
    "truthy": Shape(_rows("prompt", id=["a", "b"], source=["x", "y"], system=[SAILOR, POET]),
                    _both([system(SAILOR)], [system(POET)])),
    "system_beside_conversations": Shape(_talks(system=[SAILOR, ""]), WITH_SYSTEM),
    "system_beside_prompt_messages": Shape(
        [{"system": SAILOR, "prompt": [user(WOOL)], **ANSWERS}],
        [Meaning([system(SAILOR), user(WOOL)], assistant(SHEEP), assistant(TREES))],
    ),
    "system_prompt_mapped": Shape(_rows("prompt", instructions=[SAILOR, ""]), WITH_SYSTEM,
                                  {"columns": {"system": "instructions"}}),
    # other names of the prompt
    "question": Shape(_rows("question"), TEXTS),
    "instruction": Shape(_rows("instruction"), TEXTS),
    "alpaca": Shape(
        [{"instruction": "Answer.", "input": WOOL, "chosen": SHEEP, "rejected": TREES},
         {"instruction": HONEY, "input": "", "chosen": MAKES, "rejected": BUTTER}],
        [Meaning(f"Answer.\n{WOOL}", SHEEP, TREES), TEXTS[1]],
    ),
    "alpaca_as_chat": Shape(_rows("instruction", input=["", ""]), _both(), {"as_chat": True}),
    "own_names": Shape(_rows("frage", "gut", "schlecht"), TEXTS,
                       {"columns": {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}}),
    "as_chat": Shape(_rows("prompt"), _both(), {"as_chat": True}),
    # messages
    "axolotl_messages": Shape([{"messages": [user(WOOL)], **ANSWERS}], [ONE]),
    "axolotl_messages_texts": Shape([{"messages": [user(WOOL)], "chosen": SHEEP, "rejected": TREES}], [ONE]),
    "messages_of_two_turns": Shape(
        [{"messages": [user(HONEY), assistant(MAKES), user(WOOL)], **ANSWERS}],
        [Meaning([user(HONEY), assistant(MAKES), user(WOOL)], assistant(SHEEP), assistant(TREES))],
    ),
    "prompt_text_beside_answer_messages": Shape(
        [{"prompt": WOOL, "chosen": [assistant(SHEEP)], "rejected": [assistant(TREES)]}], [ONE]
    ),
    "ultrafeedback": Shape(_talks(prompt=[WOOL, HONEY], score_chosen=[8.0, 7.0], score_rejected=[2.0, 7.0]), _both()),
    "trl_explicit": Shape(
        [{"prompt": [user(WOOL)], "chosen": [assistant(SHEEP)], "rejected": [assistant(TREES)]}], [ONE]
    ),
    # ShareGPT
    "llama_factory_sharegpt": Shape(
        [{"conversations": [human(WOOL)], "chosen": gpt(SHEEP), "rejected": gpt(TREES)}], [ONE]
    ),
    "sharegpt_system": Shape(
        [{"conversations": [human(WOOL)], "system": SAILOR, "chosen": gpt(SHEEP), "rejected": gpt(TREES)}],
        [Meaning([system(SAILOR), user(WOOL)], assistant(SHEEP), assistant(TREES))],
    ),
    "sharegpt_in_chosen": Shape(
        [{"chosen": [human(WOOL), gpt(SHEEP)], "rejected": [human(WOOL), gpt(TREES)]}], [ONE]
    ),
    # JSON kept as text
    "conversations_as_text": Shape(_as_text(_talks(), "chosen", "rejected"), _both()),
    "prompt_messages_as_text": Shape(
        _as_text([{"prompt": [user(WOOL)], "chosen": SHEEP, "rejected": TREES}], "prompt"), [ONE]
    ),
    "answer_messages_as_text": Shape(
        _as_text([{"prompt": [user(WOOL)], "chosen": [assistant(SHEEP)], "rejected": [assistant(TREES)]}],
                 "prompt", "chosen", "rejected"), [ONE]
    ),
    "tools_as_text": Shape(
        _as_text([{"tools": [TOOL], "prompt": CALLED[:1], **ANSWERS}], "tools"),
        [Meaning([user(WOOL)], assistant(SHEEP), assistant(TREES), {"tools": [TOOL]})],
    ),
    "template_args_as_text": Shape(_as_text(_talks(chat_template_kwargs=[{"enable_thinking": False}] * 2),
                                            "chat_template_kwargs"), _both(enable_thinking=False)),
    # tools, template arguments
    "tools": Shape(
        [{"tools": [TOOL], "chosen": [*TOLD, assistant(SHEEP)], "rejected": [*TOLD, assistant(TREES)]}],
        [Meaning(TOLD, assistant(SHEEP), assistant(TREES), {"tools": [TOOL]})],
    ),
    "tool_call_as_answer": Shape(
        [{"prompt": [user(WOOL)], "chosen": [CALLED[1]], "rejected": [assistant(TREES)], "tools": [TOOL]}],
        [Meaning([user(WOOL)], CALLED[1], assistant(TREES), {"tools": [TOOL]})],
    ),
    "tools_beside_texts": Shape([{"prompt": WOOL, "chosen": SHEEP, "rejected": TREES, "tools": [TOOL]}],
                                [Meaning([user(WOOL)], assistant(SHEEP), assistant(TREES), {"tools": [TOOL]})]),
    "call_without_content": Shape(
        [{"prompt": [CALLED[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, TOLD[2]], **ANSWERS}],
        [Meaning([CALLED[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, TOLD[2]], assistant(SHEEP),
                 assistant(TREES))],
    ),
    "template_args_of_row": Shape(
        _talks(chat_template_kwargs=[{"enable_thinking": False}, {"enable_thinking": True}]),
        [Meaning([user(WOOL)], assistant(SHEEP), assistant(TREES), {"enable_thinking": False}),
         Meaning([user(HONEY)], assistant(MAKES), assistant(BUTTER), {"enable_thinking": True})],
        {"template_args": {"enable_thinking": True}},
    ),
    "template_args_of_source": Shape(_talks(), _both(enable_thinking=False), QUIET),
    "template_args_of_source_texts": Shape(_rows("prompt"), _both(enable_thinking=False), QUIET),
    # content parts
    "content_parts": Shape([{"prompt": [PARTS], **ANSWERS}], [ONE]),
    "content_parts_in_answers": Shape(
        [{"prompt": [user(WOOL)],
          "chosen": [{"role": "assistant", "content": [{"type": "text", "text": SHEEP}]}],
          "rejected": [{"role": "assistant", "content": [{"type": "text", "text": TREES}]}]}], [ONE]
    ),
    # judged
    "response_ab": Shape(
        [{"prompt": WOOL, "response_a": TREES, "response_b": SHEEP, "winner": "b"},
         {"prompt": HONEY, "response_a": MAKES, "response_b": BUTTER, "winner": "a"},
         {"prompt": HONEY, "response_a": MAKES, "response_b": BUTTER, "winner": "tie"}], TEXTS
    ),
    "response_ab_model": Shape(
        [{"prompt": WOOL, "response_a": TREES, "response_b": SHEEP, "winner": "model_b"},
         {"prompt": HONEY, "response_a": MAKES, "response_b": BUTTER, "winner": "model_a"},
         {"prompt": HONEY, "response_a": MAKES, "response_b": BUTTER, "winner": "tie (bothbad)"}], TEXTS
    ),
    "response_ab_chats": Shape(
        [{"prompt": [user(WOOL)], "response_a": TREES, "response_b": SHEEP, "winner": "b"}], [ONE]
    ),
    "response_ab_system": Shape(
        [{"system": SAILOR, "prompt": WOOL, "response_a": TREES, "response_b": SHEEP, "winner": "b"}], WITH_SYSTEM[:1]
    ),
    "ratings": Shape(
        [{"prompt": WOOL, "responses": [TREES, SHEEP], "ratings": [1, 5]},
         {"prompt": HONEY, "responses": [MAKES, BUTTER], "ratings": [4, 2]}], TEXTS
    ),
    "helpsteer3": Shape(
        [{"domain": "x", "context": [user(WOOL)], "response1": TREES, "response2": SHEEP, "overall_preference": 2},
         {"domain": "x", "context": [user(HONEY)], "response1": MAKES, "response2": BUTTER, "overall_preference": -1},
         {"domain": "x", "context": [user(HONEY)], "response1": MAKES, "response2": BUTTER, "overall_preference": 0}],
        _both(),
    ),
    "safe_rlhf": Shape(
        [{"prompt": WOOL, "response_0": TREES, "response_1": SHEEP, "better_response_id": 1, "safer_response_id": 0}],
        TEXTS[:1],
    ),
    "arena55k": Shape(
        [{"id": 1, "model_a": "x", "model_b": "y", "prompt": json.dumps([WOOL]), "response_a": json.dumps([TREES]),
          "response_b": json.dumps([SHEEP]), "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}], [ONE]
    ),
    # the prompt ends in the assistant's words
    "prefix": Shape(
        [{"prompt": [user(WOOL), assistant("Well, ")], "chosen": SHEEP, "rejected": TREES}],
        [Meaning([user(WOOL), assistant("Well, ")], assistant(SHEEP), assistant(TREES))],
    ),
    # the question again in the prompt, roles of ShareGPT, weights that are all 1
    "question_in_prompt": Shape(
        [{"question": WOOL, "prompt": f"Answer: {WOOL}", "chosen": SHEEP, "rejected": TREES}],
        [Meaning(f"Answer: {WOOL}", SHEEP, TREES)],
    ),
    "sharegpt_roles": Shape(
        [{"prompt": [{"role": "human", "content": WOOL}], "chosen": [{"role": "gpt", "content": SHEEP}],
          "rejected": [{"role": "gpt", "content": TREES}]}], [ONE]
    ),
    # columns without a value
    "empty_columns": Shape(
        _rows("prompt", system=[None, ""], tools=[None, []], images=[[], []], context=["", ""]), TEXTS
    ),
}  # fmt: skip

REFUSED = {
    "question_beside_prompt": (_rows("question", prompt=["Answer briefly.", "Answer."]), "question"),
    "images": (_rows("prompt", images=[["a.png"], ["b.png"]]), "images"),
    "context_beside_prompt": (_rows("prompt", context=["Sheep are animals.", "Bees fly."]), "context"),
    "history": (_rows("instruction", history=[[["a", "b"]], [["c", "d"]]]), "history"),
    "documents": (_rows("prompt", documents=[["a"], ["b"]]), "documents"),
    "no_prompt": ([{"chosen": SHEEP, "rejected": TREES}], "prompt"),
    "kto": ([{"prompt": WOOL, "completion": SHEEP, "label": True}], "label"),
    "image_part": (
        [{"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": WOOL}]}], **ANSWERS}],
        "image",
    ),
    "unknown_role": (
        [{"conversations": [{"from": "moon", "value": WOOL}], "chosen": gpt(SHEEP), "rejected": gpt(TREES)}], "moon"
    ),
    "two_systems": ([{"system": SAILOR, "prompt": [system(POET), user(WOOL)], **ANSWERS}], "system"),
}  # fmt: skip
"""Rows that no reading fits, and the word that the error must have."""
