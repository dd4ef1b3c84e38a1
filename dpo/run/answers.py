"""Answers to a few evaluation prompts: the reference's, made once, and the policy's at every evaluation.

RUN/answers/reference.json     prompts, the reference's answers, and what these belong to
            step-000100.jsonl  after 100 steps, one object an answer: {"prompt", "reference", "policy"}

Where the loss has no reference (`sft`), the model before training stands in its place.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from dpo.base.console import say
from dpo.base.errors import UserError
from dpo.base.files import write_atomically
from dpo.board.dashboard import Answer
from dpo.config import Config
from dpo.data.pair_set import PairSet
from dpo.data.tokenizer import Ids, ids_encoder, load_tokenizer
from dpo.distributed.collectives import first_on_each_node, on_main
from dpo.distributed.world import World
from dpo.model.generation import AnswerRule, generate
from dpo.model.policy import Policy
from dpo.run.files import ANSWERS
from dpo.run.inputs import Inputs

REFERENCE = "reference.json"


@dataclass(frozen=True)
class Questions:
    """Prompts of the evaluation set, as ids and as texts, and how they are answered."""

    prompts: tuple[Ids, ...]
    texts: tuple[str, ...]
    tokenizer: Any
    rule: AnswerRule

    def ask(self, policy: Policy, world: World) -> list[str]:
        """The policy's answers as texts. Every rank must get here."""
        found = generate(policy, self.prompts, self.rule, world)
        return [answer_text(self.tokenizer, ids) for ids in found]


@dataclass(frozen=True)
class AnswerBook:
    """The questions of a run with the reference's answers, and what these belong to."""

    folder: Path
    world: World
    questions: Questions
    references: tuple[str, ...]
    belongs_to: Mapping[str, Any]


def prepare_answers(
    config: Config, world: World, inputs: Inputs, reference_policy: Callable[[], Policy]
) -> AnswerBook | None:
    """The book of a run; None where `eval.samples` is 0, or there is nothing to evaluate, or no tokenizer (said in one
    line). Writes nothing: see `open_answers`.

    `reference_policy()` gives the reference, never weights of a checkpoint; it is called only where the run folder has
    no answers of it to these questions. Every rank must get here.
    """
    questions = _find_questions(config, world, inputs)
    if questions is None:
        return None
    folder = Path(str(config.train.run_dir)) / ANSWERS
    belongs_to = _belongs_to(questions, inputs.reference.hash or str(inputs.model.folder))
    references = on_main(world, lambda: _read_references(folder / REFERENCE, belongs_to, len(questions.prompts)))
    if references is None:
        references = questions.ask(reference_policy(), world)
    return AnswerBook(folder, world, questions, tuple(references), belongs_to)


def open_answers(book: AnswerBook, step: int) -> None:
    """Makes the folder ready for answers after `step` steps: the reference's are there, those of a future that a resume
    gave up are not. For rank 0 alone.
    """
    rows = [
        {"prompt": prompt, "reference": reference}
        for prompt, reference in zip(book.questions.texts, book.references, strict=True)
    ]
    content = json.dumps({"belongs_to": book.belongs_to, "answers": rows}, indent=1, ensure_ascii=False)
    write_atomically(book.folder / REFERENCE, content.encode())
    for path in book.folder.glob("step-*.jsonl"):
        number = path.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            path.unlink()


def answer(policy: Policy, book: AnswerBook, step: int) -> list[Answer]:
    """What the policy says after `step` steps, beside the reference; also written to the run folder. Every rank must
    get here.
    """
    return keep_answers(book, step, book.questions.ask(policy, book.world))


def keep_answers(book: AnswerBook, step: int, texts: Sequence[str]) -> list[Answer]:
    """The policy's answers after `step` steps beside the reference's, written to the run folder. Every rank must get
    here.
    """
    answers = [Answer(*texts) for texts in zip(book.questions.texts, book.references, texts, strict=True)]
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in answers)
    on_main(book.world, lambda: write_atomically(_file(book.folder, step), lines.encode()))
    return answers


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.jsonl"


# --- the questions ---------------------------------------------------------------------------------------------------


def _find_questions(config: Config, world: World, inputs: Inputs) -> Questions | None:
    prompts = choose_prompts(inputs.data.eval, config.eval.samples)
    if not prompts:
        return None
    path = config.model.tokenizer or str(inputs.model.folder)
    try:
        tokenizer = first_on_each_node(world, lambda: load_tokenizer(path, config.model.trust_remote_code))
    except UserError as failure:
        if world.is_main:
            say(f"no sampled answers, which need a tokenizer: {failure}")
        return None
    texts = tuple(prompt_text(tokenizer, prompt) for prompt in prompts)
    eos_ids = stop_ids(tokenizer, inputs.model.config)
    rule = AnswerRule(eos_ids, config.eval.max_new_tokens, config.eval.temperature, config.train.seed)
    return Questions(tuple(prompts), texts, tokenizer, rule)


def choose_prompts(pairs: PairSet, count: int) -> list[Ids]:
    """At most `count` different prompts of a set, evenly spread over it in the order of their first appearance."""
    _, first = np.unique(pairs.prompt_of_pair, return_index=True)
    count = min(count, len(first))
    chosen = first[np.arange(count) * len(first) // max(count, 1)]
    return [pair.prompt_ids.tolist() for pair in pairs.pairs(chosen)]


def stop_ids(tokenizer: Any, model_config: PretrainedConfig) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's EOS, with which completions are trained to end, and the model's
    own.
    """
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *ids_encoder(model_config).eos_ids)))


def prompt_text(tokenizer: Any, ids: Ids) -> str:
    """A prompt as the model reads it, special tokens included."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def answer_text(tokenizer: Any, ids: Ids) -> str:
    """An answer as a person reads it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# --- the reference's answers -----------------------------------------------------------------------------------------


def _belongs_to(questions: Questions, reference: str) -> dict[str, Any]:
    """The facts that the reference's answers depend on."""
    asked = json.dumps([questions.prompts, questions.texts, questions.rule.eos_ids])
    return {
        "reference": reference,
        "questions": hashlib.sha256(asked.encode()).hexdigest(),
        "max_new_tokens": questions.rule.max_new_tokens,
        "temperature": questions.rule.temperature,
        "seed": questions.rule.seed if questions.rule.temperature else None,
    }


def _read_references(path: Path, belongs_to: Mapping[str, Any], count: int) -> list[str] | None:
    """The answers in a file; None where there is none, or it belongs to something else, which is said."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, fact in belongs_to.items() if found["belongs_to"].get(name) != fact]
        answers = [row["reference"] for row in found["answers"]]
        other += ["content"] * (len(answers) != count or not all(isinstance(text, str) for text in answers))
    except (ValueError, KeyError, TypeError, AttributeError):
        other, answers = ["content"], []
    if other:
        say(f"{path} belongs to another {other[0]}: the reference answers again")
        return None
    return answers
