"""Conversations against plain `apply_chat_template`: prompts that are continued, tools and arguments, thoughts."""

from typing import Any

import pytest

from dpo.base.errors import InvalidValue
from dpo.encode.chat import encode_chat
from dpo.encode.encoder import Encoded, text_encoder
from dpo.encode.encoding import encode
from dpo.sources.formats.example import Example
from tests.support.tokenizer_kinds import SPECIAL, tokenizer_of

END = SPECIAL.index("<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m.content }}", "m.content | trim }}")
PARTS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
)
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.name or '' }}{{ m.content or '' }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
    "loop.index0 > ns.last and (loop.last or m.reasoning_content) %}<think>\n{{ m.reasoning_content or '' }}\n</think>"
    "\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen 3 does: the thought of the last turn alone is written, which without thinking the prompt has, empty."""


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tokenizer_with(template: str, kind: str = "byte level") -> Any:
    return tokenizer_of(kind, True, eos_token="<|im_end|>", chat_template=template)


def plain(tokenizer: Any, messages: list[Any], **args: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **args))


def check(tokenizer: Any, found: Encoded, fulls: list[list[int]]) -> None:
    """Compares the answers with the ids of whole conversations, from the prompt's end up to the end of the turn."""
    assert len(found.completions) == len(fulls) > 1
    for completion, full in zip(found.completions, fulls, strict=True):
        rest = full[len(found.prompt_ids) :]
        assert full[: len(found.prompt_ids)] == found.prompt_ids
        assert completion.ids == rest[: rest.index(END) + 1]


# --- a prompt that ends with the assistant's words -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte level", "metaspace first"])
@pytest.mark.parametrize("template", [CHATML, TRIMMED])
@pytest.mark.parametrize(
    ("begun", "answers"),
    [
        ("Well,", [" hello there", " the dog"]),
        ("Well, ", ["hello there", "over"]),
        ("well, hello\n", ["over\n", "the lazy dog"]),
        ("  A sheep", [" gives wool.", "."]),
    ],
)
def test_a_prompt_of_the_assistants_is_continued(kind: str, template: str, begun: str, answers: list[str]) -> None:
    """The prompt is that of `continue_final_message`; the answers are the rest of the joined turn."""
    tokenizer, before = tokenizer_with(template, kind), [user("hello"), assistant("there"), user("?")]
    example = Example((*before, assistant(begun)), tuple(map(assistant, answers)), ((0, 1),))
    encoded = encode(example, text_encoder(tokenizer))
    assert encoded.prompt_ids == plain(tokenizer, [*before, assistant(begun)], continue_final_message=True)
    texts = [tokenizer.decode([*encoded.prompt_ids, *one.ids]) for one in encoded.completions]
    joined = [tokenizer.apply_chat_template([*before, assistant(begun + a)], tokenize=False) for a in answers]
    assert [text.split() for text in texts] == [whole.split() for whole in joined]
    if not any(one.is_merged for one in encoded.completions):
        check(tokenizer, encoded, [plain(tokenizer, [*before, assistant(begun + answer)]) for answer in answers])


def test_a_prompt_of_parts_is_continued() -> None:
    """Texts and lists of parts, in the prompt's last message or in the answers."""
    tokenizer = tokenizer_with(PARTS)
    whole = [plain(tokenizer, [user("hello"), assistant("Well, " + answer)]) for answer in ("A sheep", "the dog")]
    for begun, answers in (
        ([{"type": "text", "text": "Well, "}], ["A sheep", "the dog"]),
        ("Well, ", [[{"type": "text", "text": "A sheep"}], [{"type": "text", "text": "the dog"}]]),
    ):
        found = encode_chat(
            text_encoder(tokenizer), [user("hello"), assistant(begun)], list(map(assistant, answers)), {}
        )
        shown = [tokenizer.decode([*found.prompt_ids, *one.ids]) for one in found.completions]
        assert shown == [tokenizer.decode(full[: len(full) - full[::-1].index(END)]) for full in whole]


# --- messages and arguments ------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "wool"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "It gives wool.", "parameters": {}}}


@pytest.mark.parametrize(
    ("messages", "answers"),
    [
        ([user("hello")], [assistant("", tool_calls=[CALL]), assistant("there")]),
        (
            [user("hello"), assistant(None, tool_calls=[CALL]), {"role": "tool", "name": "look", "content": "A sheep"}],
            [assistant("there"), assistant("over")],
        ),
        ([{"role": "system", "content": "well", "name": "dog"}, user("?")], [assistant("a"), assistant("b", name="c")]),
    ],
)
@pytest.mark.parametrize("args", [{}, {"tools": [TOOL]}])
def test_messages_and_tools_reach_the_template_whole(messages, answers, args) -> None:
    tokenizer = tokenizer_with(TOOLS)
    found = encode_chat(text_encoder(tokenizer), messages, answers, args)
    assert found.prompt_ids == plain(tokenizer, messages, add_generation_prompt=True, **args)
    assert ("gives wool" in tokenizer.decode(found.prompt_ids)) == bool(args)
    check(tokenizer, found, [plain(tokenizer, [*messages, answer], **args) for answer in answers])


@pytest.mark.parametrize("args", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
@pytest.mark.parametrize(
    "answers",
    [
        [assistant("hello"), assistant("over")],
        [assistant("hello", reasoning_content="well"), assistant("over", reasoning_content="jumps")],
    ],
)
def test_thoughts(args, answers) -> None:
    """Thoughts of earlier turns are not written; an answer with a thought does not follow a prompt without thinking."""
    tokenizer = tokenizer_with(QWEN3)
    messages = [user("hello"), assistant("there", reasoning_content="a fox"), user("?")]
    encoder = text_encoder(tokenizer)
    if args == {"enable_thinking": False} and "reasoning_content" in answers[0]:
        with pytest.raises(InvalidValue, match="chat template writes '\\\\n</think>"):
            encode_chat(encoder, messages, answers, args)
        return
    found = encode_chat(encoder, messages, answers, args)
    prompt, first = tokenizer.decode(found.prompt_ids), tokenizer.decode(found.completions[0].ids)
    assert "fox" not in prompt and found.prompt_ids == plain(tokenizer, messages, add_generation_prompt=True, **args)
    check(tokenizer, found, [plain(tokenizer, [*messages, answer], **args) for answer in answers])
    thought = answers[0].get("reasoning_content", "")
    assert prompt.endswith("<think>\n\n</think>\n\n") == (args == {"enable_thinking": False})
    assert first == (
        "hello<|im_end|>" if prompt.endswith("\n\n") else f"<think>\n{thought}\n</think>\n\nhello<|im_end|>"
    )


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "conversation"])
def test_arguments_that_are_the_trainers_are_refused(name: str) -> None:
    with pytest.raises(InvalidValue, match=r"chat template refuses the messages: .*multiple values"):
        encode_chat(text_encoder(tokenizer_with(CHATML)), [user("hello")], [assistant("a")], {name: True})


def test_a_template_that_opens_a_thought_for_the_prompt_alone() -> None:
    """The error shows where both texts part, and what would be right."""
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(InvalidValue) as error:
        encode_chat(text_encoder(tokenizer_with(template)), [user("hello")], [assistant("there")], {})
    for words in ("chat template writes '<think>\\n' for the prompt alone", "but 'there<|im_end|>\\n' there"):
        assert words in error.value.what
    assert "template_args: {enable_thinking: false}" in error.value.valid
