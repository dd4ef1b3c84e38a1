"""The prompts of a file, and their token ids for a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dpo.base.errors import InvalidValue, UserError
from dpo.encode.coder import Ids
from dpo.encode.encoder import Encoder
from dpo.encode.encoding import encode
from dpo.pairs.tokens import Limits, check_ids
from dpo.sources.formats.chat import as_messages
from dpo.sources.formats.example import Example
from dpo.sources.formats.json_rows import json_rows
from dpo.sources.formats.reading import prompt_alone
from dpo.sources.formats.row_fields import Message

SUFFIXES = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz")
"""The endings of files of prompts: one prompt per line, or rows with a field `prompt`."""


@dataclass(frozen=True)
class Question:
    """A prompt of the file, a text or messages, its place (`file:line`) and its arguments of the chat template."""

    place: str
    prompt: str | tuple[Message, ...]
    template_args: Mapping[str, object] = field(default_factory=dict)


def read_questions(path: Path, as_chat: bool) -> list[Question]:
    """Reads the prompts of a file. Raises UserError, with file and line, where they are not valid.

    Args:
        path: the file.
        as_chat: whether each text is a user's message.
    """
    if not path.is_file():
        raise UserError("command line: --prompts", f"no such file: {path}", "a .txt, .json or .jsonl file")
    if not path.name.endswith(SUFFIXES):
        raise UserError("command line: --prompts", f"{path} has no known ending", ", ".join(SUFFIXES))
    found = _text_questions(path) if path.suffix == ".txt" else _json_questions(path)
    if not found:
        raise UserError("command line: --prompts", f"{path} has no prompts", "one per line")
    return [_as_chat(question) for question in found] if as_chat else found


def _as_chat(question: Question) -> Question:
    """Returns the question with a text as messages, as training reads it: the user's message, or the turns of a
    dialogue with the marks `Human:` and `Assistant:`. Raises UserError where such a dialogue is broken.
    """
    if not isinstance(question.prompt, str):
        return question
    try:
        return replace(question, prompt=as_messages(question.prompt))
    except InvalidValue as error:
        raise error.at(question.place) from error


def _text_questions(path: Path) -> list[Question]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(str(path), f"not UTF-8 ({error.reason})", "text in UTF-8") from error
    return [Question(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def _json_questions(path: Path) -> list[Question]:
    questions = []
    for row in json_rows(str(path), str(path)):
        place = f"{path}:{row['line']}"
        try:
            example = prompt_alone(json.loads(row["row"]))
        except InvalidValue as error:
            raise error.at(place) from error
        questions.append(Question(place, example.prompt, example.template_args))  # type: ignore[arg-type]  # no ids
    return questions


def read_prompts(questions: Sequence[Question], encoder: Encoder, limits: Limits) -> list[Ids]:
    """Encodes each question as training encodes prompts, but does not truncate it.

    Args:
        questions: the prompts of the file.
        encoder: the tokenizer with its BOS and EOS.
        limits: the limits of the model.

    Raises:
        UserError: a prompt has no tokens or leaves no position for an answer.
    """
    return [_read_prompt(question, encoder, limits) for question in questions]


def _read_prompt(question: Question, encoder: Encoder, limits: Limits) -> Ids:
    try:
        ids = encode(Example(question.prompt, (), (), (), question.template_args), encoder).prompt_ids
        check_ids(ids, limits.vocab_size)
    except InvalidValue as error:
        raise error.at(question.place) from error
    if not ids:
        raise UserError(question.place, "the prompt has no token", "at least one, after which an answer begins")
    if limits.positions_are_hard and limits.max_positions is not None and len(ids) >= limits.max_positions:
        what = f"the prompt has {len(ids)} tokens, the model's positions end at {limits.max_positions}"
        raise UserError(question.place, what, f"a prompt of up to {limits.max_positions - 1}")
    return ids
