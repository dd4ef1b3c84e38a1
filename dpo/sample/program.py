"""Generates answers of a model to any prompts, beside the answers of another model.

    python -m dpo.sample --model DIR [--reference DIR] --prompts FILE [--as-chat] [--temperature 0.7 --seed 1] [--json]

FILE is a .txt file with one prompt per line, which the model reads as it is (blank lines are skipped); or JSON or JSONL
with rows {"prompt": TEXT} or {"prompt": [{"role": "user", "content": TEXT}, ...]}, whose messages go through the chat
template as in training, with `system`, `tools` and `chat_template_kwargs` of the row. With --as-chat each text is a
user's message, as with `as_chat: true` in training. Under torchrun each model is sharded over the ranks.

DIR may be a folder of LoRA adapters, which names its base, or of a run, whose trained model is taken.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import PretrainedConfig

from dpo.adapters.base import name_model
from dpo.adapters.choice import find_adapters
from dpo.adapters.spec import AdapterSpec
from dpo.base.errors import renamed_places
from dpo.config import Config, DataConfig, LoraConfig, ModelConfig, ParallelConfig
from dpo.distributed.collectives import first_on_each_node, on_main, together
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World, make_mesh
from dpo.encode.coder import Ids
from dpo.encode.encoder import Encoder, text_encoder
from dpo.encode.stops import model_stop_ids
from dpo.encode.tokenizer import has_tokenizer, load_tokenizer
from dpo.hub.files import CONFIG_FILE
from dpo.model.build import build_policy, load_weights, read_start
from dpo.model.download import find_model
from dpo.model.generation import AnswerRule, generate
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy, free_memory
from dpo.pairs.tokens import limits_of
from dpo.run.answers import answer_text
from dpo.run.inputs import check_machines, examine_machine
from dpo.run_folder.files import FINAL
from dpo.sample.arguments import read_arguments
from dpo.sample.questions import Question, read_prompts, read_questions
from dpo.sources.formats.row_fields import Message
from dpo.terminal.console import harmless, harmless_json, in_one_line, say, warn

COLUMNS = 120
"""Width of the table where the output is not a terminal."""


@dataclass(frozen=True)
class Reader:
    """A model that is not loaded yet, and the prompts as ids of its tokenizer."""

    name: str
    """For messages."""
    folder: Path
    """Of the model; of one with adapters that of its base."""
    config: PretrainedConfig
    adapters: AdapterSpec | None
    encoder: Encoder
    prompts: list[Ids]


def warn_of_texts(questions: Sequence[Question], readers: Sequence[Reader]) -> None:
    """Warns where a model has a chat template, which texts do not go through. Texts that spell control tokens are
    chats that a template has already written.
    """
    texts = [question.prompt for question in questions if isinstance(question.prompt, str)]
    for reader in readers:
        bare = [text for text in texts if not reader.encoder.controls.pattern.search(text)]
        if bare and reader.encoder.tokenizer.chat_template:
            what = f"{len(bare):,} prompts are texts, which {reader.name} is given without its chat template"
            warn(f"{what}; with --as-chat they are a user's messages (in training: as_chat: true)")


# --- answers ---------------------------------------------------------------------------------------------------------


def open_reader(path: str, flag: str, tokenizer: str | None, questions: Sequence[Question], world: World) -> Reader:
    """Finds a model and encodes the questions for it; loads no weights. Every rank must get here, or the rest hang.

    Args:
        path: a folder of a model, of adapters or of a run, or the id of a model or adapters on the Hugging Face hub.
        flag: the flag that gave `path`, for errors.
        tokenizer: the folder or hub id of the tokenizer; None: the model's.
        questions: the prompts of the file.
        world: the ranks.

    Raises:
        UserError: on every rank: the model or tokenizer is wrong, or a prompt does not fit it.
    """
    place = f"command line: {flag}"
    tokenizer_place = "command line: --tokenizer" if tokenizer else place
    with renamed_places({"model.path": place, "lora.path": place, "model.tokenizer": tokenizer_place}):
        named = first_on_each_node(world, lambda: name_model(trained_model(path), place))
        folder = find_model(named.base, "model.path", world)
        config = first_on_each_node(world, lambda: read_model_config(folder, trust_remote_code=False))
        adapters = first_on_each_node(world, lambda: _adapters(named.base, named.adapters))
        source = tokenizer or str(_tokenizer_folder(folder, adapters))
        loaded = first_on_each_node(world, lambda: load_tokenizer(source))
        limits = limits_of(None, None, config)
        encoder = together(lambda: text_encoder(loaded, model_stop_ids(config, str(folder))))
        prompts = together(lambda: read_prompts(questions, encoder, limits))
        return Reader(named.adapters or str(folder), folder, config, adapters, encoder, prompts)


def trained_model(path: str) -> str:
    """Returns the folder of the model that a run has trained, where `path` is the run's folder; else `path`."""
    final = Path(path) / FINAL
    return str(final) if final.is_dir() and not (Path(path) / CONFIG_FILE).exists() else path


def _adapters(base: str, path: str | None) -> AdapterSpec | None:
    """Returns the adapters in a folder or at a hub id."""
    config = Config(model=ModelConfig(path=base), lora=LoraConfig(path=path), data=DataConfig(train=[]))
    return find_adapters(config)


def _tokenizer_folder(folder: Path, adapters: AdapterSpec | None) -> Path:
    """Returns the folder of a model's tokenizer: that of the adapters, with which these were trained, if it has one."""
    own = adapters.folder if adapters else None
    return own if own and has_tokenizer(own) else folder


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
        say(f"{reader.name} answers {len(reader.prompts)} prompts")
    rule = AnswerRule(reader.encoder.stop_ids, max_new_tokens, temperature, seed)
    answers = generate(_load(reader, world), reader.prompts, rule, world)
    free_memory()
    return [answer_text(reader.encoder.tokenizer, ids) for ids in answers]


def _load(reader: Reader, world: World) -> Policy:
    parallel = ParallelConfig()
    policy = build_policy(reader.config, parallel, "float32", make_mesh(world, parallel), adapters=reader.adapters)
    load_weights(policy, reader.folder)
    read_start(policy)
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
