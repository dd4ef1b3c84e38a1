"""Generates answers of a model to any prompts, beside the answers of another model.

    python -m dpo.sample --model DIR [--reference DIR] --prompts FILE [--as-chat] [--temperature 0.7 --seed 1] [--json]

FILE is a .txt file with one prompt per line, which the model reads as it is (blank lines are skipped); or JSON or JSONL
with rows {"prompt": TEXT} or {"prompt": [{"role": "user", "content": TEXT}, ...]}, whose messages go through the chat
template as in training, with `system`, `tools` and `chat_template_kwargs` of the row. With --as-chat each text is a
user's message, as with `as_chat: true` in training. Under torchrun each model is sharded over the ranks.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import PretrainedConfig

from dpo.base.errors import InvalidValue, UserError, renamed_places
from dpo.config import ParallelConfig
from dpo.distributed.collectives import first_on_each_node, on_main, together
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World, make_mesh
from dpo.encode.coder import Ids
from dpo.encode.encoder import Encoder, text_encoder
from dpo.encode.encoding import encode
from dpo.encode.stops import model_stop_ids
from dpo.encode.tokenizer import load_tokenizer
from dpo.model.build import build_policy, load_weights
from dpo.model.download import find_model
from dpo.model.generation import AnswerRule, generate
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy, free_memory
from dpo.pairs.tokens import Limits, check_ids, limits_of
from dpo.run.answers import answer_text
from dpo.run.inputs import check_machines, examine_machine
from dpo.sample.arguments import read_arguments
from dpo.sources.formats.chat import as_messages
from dpo.sources.formats.example import Example
from dpo.sources.formats.json_rows import json_rows
from dpo.sources.formats.reading import prompt_alone
from dpo.sources.formats.row_fields import Message
from dpo.terminal.console import harmless, harmless_json, in_one_line, say, warn

COLUMNS = 120
"""Width of the table where the output is not a terminal."""


@dataclass(frozen=True)
class Question:
    """A prompt of the file, a text or messages, its place (`file:line`) and its arguments of the chat template."""

    place: str
    prompt: str | tuple[Message, ...]
    template_args: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Reader:
    """A model that is not loaded yet, and the prompts as ids of its tokenizer."""

    folder: Path
    config: PretrainedConfig
    encoder: Encoder
    prompts: list[Ids]


# --- questions -------------------------------------------------------------------------------------------------------


SUFFIXES = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz")
"""The endings of files of prompts: one prompt per line, or rows with a field `prompt`."""


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


def warn_of_texts(questions: Sequence[Question], readers: Sequence[Reader]) -> None:
    """Warns where a model has a chat template, which texts do not go through. Texts that spell control tokens are
    chats that a template has already written.
    """
    texts = [question.prompt for question in questions if isinstance(question.prompt, str)]
    for reader in readers:
        bare = [text for text in texts if not reader.encoder.controls.pattern.search(text)]
        if bare and reader.encoder.tokenizer.chat_template:
            what = f"{len(bare):,} prompts are texts, which {reader.folder} is given without its chat template"
            warn(f"{what}; with --as-chat they are a user's messages (in training: as_chat: true)")


# --- answers ---------------------------------------------------------------------------------------------------------


def open_reader(path: str, flag: str, tokenizer: str | None, questions: Sequence[Question], world: World) -> Reader:
    """Finds a model and encodes the questions for it; loads no weights. Every rank must get here, or the rest hang.

    Args:
        path: a model folder or an id on the Hugging Face hub.
        flag: the flag that gave `path`, for errors.
        tokenizer: the folder or hub id of the tokenizer; None: the model's.
        questions: the prompts of the file.
        world: the ranks.

    Raises:
        UserError: on every rank: the model or tokenizer is wrong, or a prompt does not fit it.
    """
    place = f"command line: {flag}"
    places = {"model.path": place, "model.tokenizer": "command line: --tokenizer" if tokenizer else place}
    with renamed_places(places):
        folder = find_model(path, "model.path", world)
        config = first_on_each_node(world, lambda: read_model_config(folder, trust_remote_code=False))
        loaded = first_on_each_node(world, lambda: load_tokenizer(tokenizer or str(folder)))
        limits = limits_of(None, None, config)
        encoder = together(lambda: text_encoder(loaded, model_stop_ids(config, str(folder))))
        return Reader(folder, config, encoder, together(lambda: read_prompts(questions, encoder, limits)))


def answers_of(reader: Reader, max_new_tokens: int, temperature: float, seed: int, world: World) -> list[str]:
    """Loads the model, generates its answers, and frees its memory. Every rank must get here, or the rest hang.

    Args:
        reader: the model, and the prompts as ids.
        max_new_tokens: the maximum tokens of an answer.
        temperature: 0 takes the most probable token; above 0, tokens are drawn from the softmax at this temperature.
        seed: the seed of the draws.
        world: the ranks, after `start_devices`.

    Returns:
        The answer to each prompt, as text, the same on every rank.
    """
    if world.is_main:
        say(f"{reader.folder} answers {len(reader.prompts)} prompts")
    rule = AnswerRule(reader.encoder.stop_ids, max_new_tokens, temperature, seed)
    answers = generate(_load(reader, world), reader.prompts, rule, world)
    free_memory()
    return [answer_text(reader.encoder.tokenizer, ids) for ids in answers]


def _load(reader: Reader, world: World) -> Policy:
    parallel = ParallelConfig()
    policy = build_policy(reader.config, parallel, "float32", make_mesh(world, parallel))
    load_weights(policy, reader.folder)
    return policy


# --- output ----------------------------------------------------------------------------------------------------------


def show_json(questions: Sequence[Question], answers: dict[str, list[str]]) -> None:
    """Prints a JSON object per question, {"prompt", "policy"}, with "reference" where a reference is given."""
    for number, question in enumerate(questions):
        texts_by_model = {name: texts[number] for name, texts in answers.items()}
        print(harmless_json(json.dumps({"prompt": question.prompt} | texts_by_model, ensure_ascii=False)))


def show_table(questions: Sequence[Question], answers: dict[str, list[str]]) -> None:
    """Prints a table with a row per question and a column per model."""
    table = Table("prompt", *(Column(Text(in_one_line(name))) for name in answers), show_lines=True)
    for number, question in enumerate(questions):
        texts = [_shown(question.prompt), *(says[number] for says in answers.values())]
        table.add_row(*(Text(harmless(text)) for text in texts))
    Console(width=None if sys.stdout.isatty() else COLUMNS).print(table)


def _shown(prompt: str | tuple[Message, ...]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs `python -m dpo.sample`."""
    args = read_arguments()
    parallel = ParallelConfig()
    with open_world(parallel.setup_timeout_seconds) as world:
        questions = on_main(world, lambda: read_questions(args.prompts, args.as_chat))
        facts = examine_machine(world)
        paths = {"policy": (args.model, "--model"), "reference": (args.reference, "--reference")}
        readers = {
            name: open_reader(path, flag, args.tokenizer, questions, world)
            for name, (path, flag) in paths.items()
            if path is not None
        }
        if world.is_main:
            warn_of_texts(questions, list(readers.values()))
        check_machines(
            world, facts, parallel, "float32", [reader.config for reader in readers.values()], compiles=False
        )
        start_devices(world, parallel.timeout_seconds)
        rule = (args.max_new_tokens, args.temperature, args.seed)
        answers = {name: answers_of(reader, *rule, world) for name, reader in readers.items()}
        if world.is_main:
            (show_json if args.json else show_table)(questions, answers)
