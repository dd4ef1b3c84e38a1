"""Answers to a few evaluation prompts: the reference's, made once, and the policy's at every evaluation.

RUN/answers/reference.json     prompts, the reference's answers, and the facts that these depend on
            step-000100.jsonl  after 100 steps, one object per answer: {"prompt", "reference", "policy"}

Where the loss has no reference (`sft`), the model before training takes its place.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.base.errors import UserError
from dpo.base.files import write_atomically
from dpo.board.sink import Answer
from dpo.config import Config
from dpo.distributed.collectives import first_on_each_node, on_main
from dpo.distributed.world import World
from dpo.encode.coder import Ids
from dpo.encode.stops import model_stop_ids, stop_ids
from dpo.encode.tokenizer import load_tokenizer
from dpo.model.generation import AnswerRule, generate
from dpo.model.policy import Policy
from dpo.pairs.pair_set import PairSet
from dpo.run.inputs import Inputs
from dpo.run_folder.files import ANSWERS, answers_path, read_answer_rows
from dpo.terminal.console import say

REFERENCE = "reference.json"


@dataclass(frozen=True)
class Questions:
    """Prompts of the evaluation set, as ids and as texts, and the rule by which they are answered."""

    prompts: tuple[Ids, ...]
    texts: tuple[str, ...]
    tokenizer: Any
    rule: AnswerRule

    def ask(self, policy: Policy, world: World) -> list[str]:
        """Returns the policy's answers as texts. Every rank must get here, or the rest hang."""
        answers = generate(policy, self.prompts, self.rule, world)
        return [answer_text(self.tokenizer, ids) for ids in answers]


@dataclass(frozen=True)
class AnswerBook:
    """The questions of a run with the reference's answers, and the facts that these depend on."""

    folder: Path
    world: World
    questions: Questions
    references: tuple[str, ...]
    belongs_to: Mapping[str, Any]


def prepare_answers(
    config: Config, world: World, inputs: Inputs, reference_policy: Callable[[], Policy]
) -> AnswerBook | None:
    """Returns the questions of a run with the reference's answers. Every rank must get here, or the rest hang.

    Writes nothing: `open_answers` does.

    Args:
        config: the run's.
        world: all ranks.
        inputs: the evaluation set, and the reference by content.
        reference_policy: returns the reference, never the weights of a checkpoint; called only where the run folder has
            no answers of this reference to these questions.

    Returns:
        None where `eval.samples` is 0, where there is nothing to evaluate, or where there is no tokenizer, which rank 0
        reports.
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
    """Writes the reference's answers, and removes the policy's answers of steps after `step`, from which the run
    resumes. For rank 0 alone.
    """
    rows = [
        {"prompt": prompt, "reference": reference}
        for prompt, reference in zip(book.questions.texts, book.references, strict=True)
    ]
    facts = {"belongs_to": book.belongs_to, "sha256": _sha256(rows), "answers": rows}
    content = json.dumps(facts, indent=1, ensure_ascii=False)
    write_atomically(book.folder / REFERENCE, content.encode())
    for path in book.folder.glob("step-*.jsonl"):
        number = path.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            path.unlink()


def answer(policy: Policy, book: AnswerBook, step: int) -> list[Answer]:
    """Generates the policy's answers, and writes them to the run folder beside the reference's.

    Every rank must get here, or the rest hang.

    Args:
        policy: the sharded model.
        book: the questions, with the reference's answers.
        step: updates made so far, 0 before the first.

    Returns:
        One row per question: prompt, the reference's answer and the policy's.
    """
    return keep_answers(book, step, book.questions.ask(policy, book.world))


def keep_answers(book: AnswerBook, step: int, texts: Sequence[str]) -> list[Answer]:
    """Writes the policy's answers to the run folder beside the reference's; returns both.

    Every rank must get here, or the rest hang.

    Args:
        book: the questions, with the reference's answers.
        step: updates made so far, which names the file.
        texts: the policy's answers, in the order of the questions.
    """
    answers = [Answer(*row) for row in zip(book.questions.texts, book.references, texts, strict=True)]
    lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in answers)
    on_main(book.world, lambda: write_atomically(answers_path(book.folder.parent, step), lines.encode()))
    return answers


def read_answers(book: AnswerBook, step: int) -> list[Answer]:
    """Returns the answers that `keep_answers` wrote after `step` steps; none where it wrote none."""
    path = answers_path(book.folder.parent, step)
    return [Answer(**row) for row in read_answer_rows(path)] if path.exists() else []


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
    eos_ids = stop_ids(tokenizer, model_stop_ids(inputs.model.config, str(inputs.model.folder)))
    rule = AnswerRule(eos_ids, config.eval.max_new_tokens, config.eval.temperature, config.train.seed)
    return Questions(tuple(prompts), texts, tokenizer, rule)


def choose_prompts(pairs: PairSet, count: int) -> list[Ids]:
    """Returns at most `count` different prompts of a set, spread evenly over them in the order of first appearance."""
    _, first = np.unique(pairs.prompt_of_pair, return_index=True)
    count = min(count, len(first))
    chosen = first[np.arange(count) * len(first) // max(count, 1)]
    return [pair.prompt_ids.tolist() for pair in pairs.pairs(chosen)]


def prompt_text(tokenizer: Any, ids: Ids) -> str:
    """Returns a prompt as the model reads it, with special tokens such as those of a chat, but without a BOS before it,
    which is no part of the text.
    """
    shown = ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids
    return str(tokenizer.decode(shown, clean_up_tokenization_spaces=False))


def answer_text(tokenizer: Any, ids: Ids) -> str:
    """Returns an answer as a person reads it, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# --- the reference's answers -----------------------------------------------------------------------------------------


def _belongs_to(questions: Questions, reference: str) -> dict[str, Any]:
    """Returns the facts that the reference's answers depend on."""
    asked = json.dumps([questions.prompts, questions.texts, questions.rule.eos_ids])
    return {
        "reference": reference,
        "questions": hashlib.sha256(asked.encode()).hexdigest(),
        "max_new_tokens": questions.rule.max_new_tokens,
        "temperature": questions.rule.temperature,
        "seed": questions.rule.seed if questions.rule.temperature else None,
    }


def _sha256(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns the hash of the reference's answers, by which a damaged file is found."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read_references(path: Path, belongs_to: Mapping[str, Any], count: int) -> list[str] | None:
    """Returns the answers in a file; None where there is no file, or where it depends on other facts (reported)."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, fact in belongs_to.items() if content["belongs_to"].get(name) != fact]
        answers = [row["reference"] for row in content["answers"]]
        if len(answers) != count or content["sha256"] != _sha256(content["answers"]):
            other.append("format")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        other, answers = ["format"], []
    if other:
        say(f"{path} does not match this run's {other[0]}: the reference's answers are generated again")
        return None
    return answers
