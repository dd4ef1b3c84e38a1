"""Messages -> ids: by the tokenizer's chat template, which writes all control tokens.

    prompt    the template's text of the messages, up to where the assistant begins
    answer    what the template's text of messages and answer has after the prompt, up to the first stop token

    [{user: Hi}], {assistant: Yes}       "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n" | "Yes<|im_end|>"

A prompt whose last message is the assistant's is continued, not closed: both messages become one turn.

    [..., {assistant: Well,}], {assistant:  yes}       "…<|im_start|>assistant\\nWell," | " yes<|im_end|>"

Both are encoded without further special tokens; where the template writes no stop token, EOS is appended. The ids are
those of `apply_chat_template(tokenize=True)`. A message that spells a control token, such as "Write </s> at the end",
keeps it as text (`controls.py`): it neither ends the answer nor opens a turn.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2
import jinja2.meta

from dpo.base.errors import InvalidValue, UserError
from dpo.encode.coder import Ids, completions_after
from dpo.encode.controls import hide, is_as_marked, mark, reveal, spells_control, unmark
from dpo.encode.encoder import Completion, Encoded, Encoder
from dpo.encode.unwritten import leaves_out
from dpo.sources.formats.row_fields import ASSISTANT, Message, few

SHOWN = 40
"""Characters of a text that an error shows."""
SHOWN_OF_ERROR = 300
"""Characters of an error of the chat template, which may hold a whole message."""
OF_TRANSFORMERS = ("add_generation_prompt", "messages", "raise_exception", "strftime_now")
"""Variables of a chat template that transformers gives, beside the tokenizer's special tokens."""
TextPart = Mapping[str, Any]
"""A part of a message's content: {"type": "text", "text": ...}."""


def encode_chat(
    encoder: Encoder, messages: Sequence[Message], answers: Sequence[Message], template_args: Mapping[str, Any]
) -> Encoded:
    """Returns the ids of the messages of a prompt and of the answers to them.

    Args:
        encoder: the tokenizer with its stop tokens.
        messages: the messages of the prompt, at least one.
        answers: the assistant's messages, one per completion.
        template_args: arguments of the chat template, `tools` among them.

    Raises:
        InvalidValue: as `chat_texts` does.
    """
    prompt, texts = chat_texts(encoder.tokenizer, messages, answers, template_args)
    has_unwritten = any(
        leaves_out([*messages, answer], prompt + text) for answer, text in zip(answers, texts, strict=True)
    )
    if spells_control(encoder.controls, [messages, answers, template_args]):
        encoded = _encode_as_text(encoder, (messages, answers, template_args), (prompt, texts))
        return replace(encoded, has_unwritten=has_unwritten)
    prompt_ids = encoder.plain.at_start(prompt)
    found = completions_after(encoder.plain, prompt, prompt_ids, texts)
    completions = [Completion(_until_stop(encoder, ids), is_merged) for ids, is_merged in found]
    return Encoded(prompt_ids, tuple(completions), kind="chats", has_unwritten=has_unwritten)


def _encode_as_text(
    encoder: Encoder,
    chat: tuple[Sequence[Message], Sequence[Message], Mapping[str, Any]],
    rendered: tuple[str, list[str]],
) -> Encoded:
    """Returns the ids of a chat whose messages spell control tokens, which stay text.

    The answers are unclear where the tokenizer cannot be copied, or the template looks into the texts of messages.
    """
    coder = encoder.marked
    marked = _marked_texts(encoder, chat, rendered)
    if coder is None or marked is None:
        unclear = tuple(Completion([], is_unclear=True) for _ in rendered[1])
        return Encoded(encoder.plain.at_start(rendered[0]), unclear, kind="chats", has_control_text=True)
    prompt, texts = marked
    prompt_ids = coder.at_start(prompt)
    found = completions_after(coder, prompt, prompt_ids, texts)
    parts = [(prompt, prompt_ids), *((text, ids) for text, (ids, _) in zip(texts, found, strict=True))]
    clear = [is_as_marked(encoder.controls, *part) for part in parts]
    completions = [
        Completion(_until_stop(encoder, ids), is_merged, is_unclear=not (clear[0] and is_clear))
        for (ids, is_merged), is_clear in zip(found, clear[1:], strict=True)
    ]
    return Encoded(prompt_ids, tuple(completions), kind="chats", has_control_text=True)


def _marked_texts(
    encoder: Encoder,
    chat: tuple[Sequence[Message], Sequence[Message], Mapping[str, Any]],
    rendered: tuple[str, list[str]],
) -> tuple[str, list[str]] | None:
    """Returns the texts of a prompt and its answers with the template's control tokens as marks; None where the
    template does not write hidden texts as it writes the texts themselves.
    """
    controls, plain = encoder.controls, [rendered[0], *rendered[1]]
    try:
        prompt, answers = chat_texts(encoder.tokenizer, *(hide(controls, part) for part in chat))
    except InvalidValue:
        return None
    marked = [reveal(controls, mark(controls, text)) for text in (prompt, *answers)]
    is_same = [unmark(controls, text) for text in marked] == plain
    return (marked[0], marked[1:]) if is_same else None


def _until_stop(encoder: Encoder, ids: Ids) -> Ids:
    """Returns the ids up to the first stop token; EOS is appended where there is none. Text that a template writes
    after it is not part of the answer.
    """
    end = next((i for i, number in enumerate(ids) if number in encoder.stop_ids), None)
    return [*ids, encoder.stop_ids[0]] if end is None else ids[: end + 1]


# --- the template ----------------------------------------------------------------------------------------------------


def chat_texts(
    tokenizer: Any, messages: Sequence[Message], answers: Sequence[Message], template_args: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """Returns the chat template's text of the prompt, up to where the assistant begins or goes on, and of each answer
    after it.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: the messages of the prompt, at least one.
        answers: the assistant's messages, one per completion, each of which follows the prompt alone.
        template_args: arguments of the chat template, `tools` among them.

    Returns:
        The prompt's text, and the text of each answer, in the order of `answers`.

    Raises:
        InvalidValue: there is no chat template, it fails, or the text of prompt and answer does not begin with the
            text of the prompt.
    """
    is_continued = messages[-1]["role"] == ASSISTANT
    opening = {"continue_final_message": True} if is_continued else {"add_generation_prompt": True}
    prompt = _render(tokenizer, messages, template_args, **opening)
    fulls = [_render(tokenizer, _with_answer(messages, answer, is_continued), template_args) for answer in answers]
    for full in fulls:
        _check_adds(prompt, full)
    return prompt, [full[len(prompt) :] for full in fulls]


def _render(tokenizer: Any, messages: Sequence[Message], template_args: Mapping[str, Any], **opening: bool) -> str:
    """Returns the chat template's text of messages. Raises InvalidValue where there is no template, or it fails."""
    if not tokenizer.chat_template:
        what = "messages need a chat template, which the tokenizer lacks"
        raise InvalidValue(what, "a model.tokenizer with one, or texts")
    try:
        listed = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(listed, tokenize=False, **opening, **template_args))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        what = f"the tokenizer's chat template refuses the messages: {str(error)[:SHOWN_OF_ERROR]}"
        raise InvalidValue(what, "messages and roles that it takes, or another template in model.tokenizer") from error


def _check_adds(prompt: str, full: str) -> None:
    """Raises InvalidValue where the text of prompt and answer does not begin with the text of the prompt."""
    if full.startswith(prompt):
        return
    same = next(i for i in range(len(prompt)) if prompt[i] != full[i : i + 1])
    alone, both = (text[same : same + SHOWN] for text in (prompt, full))
    raise InvalidValue(
        f"the tokenizer's chat template writes {alone!r} for the prompt alone, after {prompt[:same][-SHOWN:]!r}, but "
        f"{both!r} there for prompt and answer: an answer would not follow the prompt that the model is given",
        "a template that only adds; one that opens a thought with template_args: {enable_thinking: false} or with "
        "answers that have the thought",
    )


# --- arguments that the template reads --------------------------------------------------------------------------------


def check_arguments(tokenizer: Any, names: Collection[str], place: str) -> None:
    """Raises UserError for an argument that the chat template does not read, so that it would change nothing.

    Args:
        tokenizer: a transformers tokenizer.
        names: the names of the arguments of `apply_chat_template`.
        place: the place of the source, with which the error begins.
    """
    read = _names_read(tokenizer.chat_template)
    if read is None or set(names) <= read:
        return
    unread = " and ".join(sorted(set(names) - read))
    known = few(sorted(read - set(OF_TRANSFORMERS))) or "none"
    valid = f"arguments that it reads ({known}), or columns: {{unused: NAME}} to leave a column out"
    raise UserError(place, f"the tokenizer's chat template does not read {unread}", valid)


def _names_read(template: str | Mapping[str, str] | None) -> set[str] | None:
    """Returns the variables that a chat template, or any of several, reads; None where jinja alone cannot tell."""
    texts = list(template.values()) if isinstance(template, Mapping) else [template or ""]
    try:
        trees = [jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text) for text in texts]
    except jinja2.TemplateSyntaxError:
        return None
    return set[str]().union(*map(jinja2.meta.find_undeclared_variables, trees))


# --- a prompt that ends with the assistant's words -------------------------------------------------------------------


def _with_answer(messages: Sequence[Message], answer: Message, is_continued: bool) -> list[Message]:
    """Returns the messages with the answer as the last one, or as the rest of the last one."""
    if not is_continued:
        return [*messages, answer]
    last = messages[-1]
    content: Any = _joined(last.get("content"), answer.get("content"))
    return [*messages[:-1], {**last, **answer, "content": content}]


def _joined(first: Any, second: Any) -> Any:
    """Returns two contents of a message as one: texts, or lists of parts."""
    if isinstance(first or "", str) and isinstance(second or "", str):
        return (first or "") + (second or "")
    before, after = (_parts(content) for content in (first, second))
    if before and after and before[-1].get("type") == after[0].get("type") == "text":
        return [*before[:-1], {**before[-1], "text": before[-1]["text"] + after[0]["text"]}, *after[1:]]
    return before + after


def _parts(content: Any) -> list[TextPart]:
    return [{"type": "text", "text": content or ""}] if isinstance(content or "", str) else list(content)
